"""Student, teacher, their attention, parallel layouts and names in Hugging Face (floor 1)."""

import mobilellm_pro.config  # noqa: F401  prepares torchtitan before any module here imports it
