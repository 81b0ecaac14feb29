"""Small students that look trained: weights of several sizes, norms that are not one, ranges that were moved."""

import torch
from torch import Tensor

from mobilellm_pro.model.quantized_modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    StudentQuantization,
    is_range,
    quantize_modules,
)
from mobilellm_pro.model.student import Student, StudentArgs
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight
from mobilellm_pro.quantization.weight_quantizer import fake_quantize, fake_quantize_learned
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


def full_student(seed: int = 0, args: StudentArgs = ARGS) -> Student:
    """In full precision."""
    torch.manual_seed(seed)
    student = Student(args)
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


def tokens(length: int = 60) -> Tensor:
    """[2, length] ids."""
    return torch.randint(0, ARGS.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def multiplied_by(student: Student) -> dict[str, Tensor]:
    """Name -> what the student multiplies by while it trains, from its own modules."""
    found = {}
    for name, module in student.named_modules():
        if isinstance(module, QuantizedLinear):
            quantization, scales = module.quantization, module.weight_scales
            weight, scheme = module.weight.to(quantization.param_dtype), quantization.scheme.weights
            found[f"{name}.weight"] = (
                fake_quantize(weight, scheme) if scales is None else fake_quantize_learned(weight, scales, scheme)
            )
        elif isinstance(module, QuantizedEmbedding):
            dtype = module.quantization.param_dtype
            found[f"{name}.weight"] = module(torch.arange(module.num_embeddings)).to(dtype)
            head = module.head(torch.zeros(1, module.embedding_dim))[1].to(dtype)
            if module.quantization.scheme.shared_table:
                assert torch.equal(head, found[f"{name}.weight"])
            else:
                found["lm_head.weight"] = head
    return found


def xnnpack_parts(name: str, weight: QuantizedWeight) -> tuple[bytes, bytes]:
    """A weight as its kernels read it: integers plus 8, the even column in the low half of a byte; and scales.

    The table is stored with neighbouring columns swapped, and scales of groups of zeros are not zero.
    """
    integers, scales = weight
    if name == "embed_tokens.weight":
        integers = integers.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    scales = torch.where(scales == 0, 2.0**-100, scales).bfloat16()
    offset = (integers + 8).to(torch.uint8)
    return (offset[:, 0::2] | offset[:, 1::2] << 4).numpy().tobytes(), scales.view(torch.int16).numpy().tobytes()
