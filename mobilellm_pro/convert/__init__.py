"""Checkpoints between torchtitan's DCP format and Hugging Face's (floor 2)."""

import mobilellm_pro.config  # noqa: F401  prepares torchtitan before any module here imports it
