"""Small students that look trained: weights of several sizes, norms that are not one, ranges that were moved."""

import torch

from mobilellm_pro.model.quantized_modules import StudentQuantization, is_range, quantize_modules
from mobilellm_pro.model.student import Student, StudentArgs
from tests.data.synthetic import DEBUG_TOKENIZER

TOKENIZER = str(DEBUG_TOKENIZER)
ARGS = StudentArgs(
    vocab_size=4096,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    sliding_window=16,
    global_layers=(0, 2),
)


def full_student(seed: int = 0) -> Student:
    """In full precision."""
    torch.manual_seed(seed)
    student = Student(ARGS)
    student.init_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else torch.rand_like(parameter) + 0.5)
    return student.requires_grad_(False).eval()


def quantized_student(scheme: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: bool) -> Student:
    """As training leaves one: master weights in float32, learned ranges away from the computed ones."""
    student = full_student(seed)
    quantize_modules(student, StudentQuantization(scheme, param_dtype=dtype, **settings))
    student.requires_grad_(False).eval()
    for name, parameter in student.named_parameters():
        if is_range(name):
            parameter.mul_(0.8 + 0.4 * torch.rand_like(parameter))
    return student


def tokens(length: int = 60) -> torch.Tensor:
    """[2, length] ids."""
    return torch.randint(0, ARGS.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
