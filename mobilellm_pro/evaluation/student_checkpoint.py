"""A student's checkpoint in memory, as every evaluation wants it: on this process' device, and certainly a student."""

import os
from typing import NamedTuple

import torch

from mobilellm_pro.convert.packed_folder import is_packed, load_packed_student
from mobilellm_pro.convert.quantized_model import quantize_student
from mobilellm_pro.convert.unpacked_student import unpacked_student
from mobilellm_pro.model.checkpoint import find_checkpoint, load_model
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
        checkpoint: a run folder, one `step-N` folder, a Hugging Face folder, or one of packed four-bit integers, whose
            arithmetic is that of the scheme.
        dtype: of the weights; default that of a packed folder's scheme, else bfloat16 on a GPU, float32 on a CPU.
        device: default this process' GPU, where there is one.
        quantize: a scheme to whose few bits a student in full precision is rounded to nearest.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is not a student's, or is damaged, or is quantized already and shall be again.
    """
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = device or own
    if is_packed(checkpoint):
        model, tokenizer, max_tokens = load_packed_student(checkpoint, dtype=dtype)
        scheme = None
    else:
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        scheme = quantize or _trained_scheme(checkpoint)
        # What is rounded to few bits must be the weight itself, not the weight rounded to fewer digits before.
        read = (dtype, device) if scheme is None else ("float32", "cpu")
        model, tokenizer, max_tokens = load_model(checkpoint, *read)
    if not isinstance(model, Student):
        raise ValueError(f"{checkpoint}: a {type(model).__name__.lower()}; only students have a KV cache")
    if quantize is not None and model.quantization is not None:
        raise ValueError(f"{checkpoint}: quantized already, scheme {model.quantization.name}; leave out --quantize")
    if scheme is not None:  # multiplied out once, where training rounds in every step
        model = unpacked_student(quantize_student(model, scheme, tokenizer, max_tokens), dtype=dtype)
    model.to(device)
    kept = str(model.norm.weight.dtype).removeprefix("torch.")
    return LoadedStudent(model, tokenizer, max_tokens, device, kept)


def _trained_scheme(checkpoint: str) -> str | None:
    """That a run's checkpoint was quantized with while it trained."""
    try:
        scheme = find_checkpoint(checkpoint).config.quantization.scheme
    except FileNotFoundError:  # no run's; what is wrong with it, its reader says
        return None
    return None if scheme == "none" else scheme
