"""Checkpoints in other forms: Hugging Face's, packed int4, transformers with torchao, ExecuTorch (floor 2)."""

import mobilellm_pro.config  # noqa: F401  prepares torchtitan before any module here imports it
