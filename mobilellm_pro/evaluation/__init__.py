"""What a trained model does (floor 2)."""

import mobilellm_pro.config  # noqa: F401  prepares torchtitan before any module here imports it
