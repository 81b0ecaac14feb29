"""A student's checkpoint in memory, as every evaluation wants it: on this process' device, and certainly a student."""

import os
from typing import NamedTuple

import torch

from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.model.quantized_modules import StudentQuantization, quantize_modules
from mobilellm_pro.model.student import Student


class LoadedStudent(NamedTuple):
    """A student, and what its checkpoint says."""

    model: Student
    tokenizer: str
    """Source for `Tokenizer.load`."""

    max_tokens: int
    """Longest row that it was trained on."""

    device: str
    dtype: str
    """Of the weights."""


def load_student(
    checkpoint: str, dtype: str | None = None, device: str | None = None, quantize: str | None = None
) -> LoadedStudent:
    """Reads a student; as `load_model`, which reads any model.

    Args:
        checkpoint: a run folder, one `step-N` folder, or a Hugging Face folder.
        dtype: of the weights; default bfloat16 on a GPU, float32 on a CPU.
        device: default this process' GPU, where there is one.
        quantize: a scheme to whose few bits a student in full precision is rounded to nearest.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is not a student's, or is damaged, or was quantized while it trained and shall be again.
    """
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = device or own
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    model, tokenizer, max_tokens = load_model(checkpoint, dtype, device)
    if not isinstance(model, Student):
        raise ValueError(f"{checkpoint}: a {type(model).__name__.lower()}; only students have a KV cache")
    if quantize is not None:
        quantize_modules(model, StudentQuantization(quantize, param_dtype=model.norm.weight.dtype))
    return LoadedStudent(model, tokenizer, max_tokens, device, dtype)
