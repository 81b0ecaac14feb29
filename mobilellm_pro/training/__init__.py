"""One loop for every phase: torchtitan's, with a frozen teacher beside the student (floor 2)."""

import mobilellm_pro.config  # noqa: F401  prepares torchtitan before any module here imports it
