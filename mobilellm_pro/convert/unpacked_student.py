"""A quantized model that runs in eager PyTorch: what every other form of it is compared with, and what evaluations run.

It computes what the student computed while it trained quantized, to the bit. Weights are integer times scale, kept in
the type of the activations; where the scheme says so, what goes into a linear layer or the head and what a KV cache
would hold is rounded to eight bits. Nothing here saves memory.

Shapes: D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.config import TORCH_DTYPE_MAP

from mobilellm_pro.convert.quantized_model import HEAD, QuantizedModel
from mobilellm_pro.model.student import SelfAttention, Student, TiedEmbedding
from mobilellm_pro.quantization.token_quantizer import ZeroPoint, fake_quantize_tokens


class TokenLinear(nn.Linear):
    """A linear layer whose input is quantized per token."""

    def __init__(self, plain: nn.Linear, bits: int, zero_point: ZeroPoint) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.bits, self.zero_point = bits, zero_point

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(fake_quantize_tokens(input, self.bits, self.zero_point), self.weight)


class UnpackedTable(TiedEmbedding):
    """Embedding and head, of one table or of one each; the head's input is quantized per token if `bits` says so."""

    def __init__(self, plain: nn.Embedding, shared: bool, bits: int | None, zero_point: ZeroPoint) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim)
        self.bits, self.zero_point = bits, zero_point
        self.head_weight = None if shared else nn.Parameter(torch.empty_like(self.weight))

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> what the head multiplies: hidden states [..., D] and weight [V, D]."""
        if self.bits is not None:
            hidden = fake_quantize_tokens(hidden, self.bits, self.zero_point)
        return hidden, self.weight if self.head_weight is None else self.head_weight


@torch.no_grad()
def unpacked_student(
    model: QuantizedModel, *, zero_point: ZeroPoint = "exact", round_cache: bool = True, dtype: str | None = None
) -> Student:
    """Puts the numbers of a quantized model into a student, frozen and in evaluation mode, on the CPU.

    Args:
        model: its integers are multiplied out a weight at a time.
        zero_point: of activations: "exact" as the paper and training have it, "integer" as integer kernels do.
        round_cache: whether a run without a KV cache rounds keys and values as the scheme's cache would.
        dtype: "float32", "bfloat16" or default model.dtype.
    """
    kind = TORCH_DTYPE_MAP[dtype or model.dtype]
    with torch.device("meta"):
        student = Student(model.args)
        _change(student, model, zero_point, round_cache)
    student.to(kind).to_empty(device="cpu").requires_grad_(False)
    for name, parameter in student.named_parameters():
        stored = HEAD if name == "embed_tokens.head_weight" else name
        parameter.copy_(model.weights[stored].dequantize(kind) if stored in model.weights else model.norms[stored])
    return student.eval()


def _change(student: Student, model: QuantizedModel, zero_point: ZeroPoint, round_cache: bool) -> None:
    """Puts the modules above in the place of a student's, and has its keys and values rounded."""
    scheme, bits = model.scheme, model.scheme.activation_bits
    student.quantization = model.quantization
    student.embed_tokens = UnpackedTable(student.embed_tokens, scheme.shared_table, bits, zero_point)
    for name, module in list(student.named_modules()):
        if isinstance(module, nn.Linear) and bits is not None:
            student.set_submodule(name, TokenLinear(module, bits, zero_point))
        elif isinstance(module, SelfAttention) and round_cache and scheme.cache == "int8":
            module.stored = fake_quantize_tokens
