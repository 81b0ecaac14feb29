"""Linear layers, embedding and cache that compute, while training, with the few bits that will be stored.

`quantize_modules` changes a student in place: before its parameters have memory for training, or after they are loaded
for rounding to nearest. Names of weights stay; learned ranges are parameters beside them, [R, G] for weights [R, C]:
`weight_scales`, and `head_scales` where the head has a table of its own. So FSDP shards them with their weights, and
tensor parallelism splits them by rows or, where columns are split, keeps them whole.

Master weights are rounded to the type that is trained in before they are quantized, on every layout: under FSDP they
arrive in it.

Shapes: R rows (output channels, or ids), C columns, G groups of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mobilellm_pro.quantization.scheme import SCHEMES, Scheme
from mobilellm_pro.quantization.token_quantizer import fake_quantize_tokens
from mobilellm_pro.quantization.weight_quantizer import choose_scales, fake_quantize, fake_quantize_learned

RANGES = ("weight_scales", "head_scales")
"""Last part of the names of learned ranges."""


@dataclass(frozen=True)
class StudentQuantization:
    """How a student is quantized.

    Attributes:
        name: key of `SCHEMES`.
        learned_ranges: whether ranges of weights are parameters; None: as the scheme says.
        param_dtype: type that weights are rounded to first.
        range_lr: peak learning rate of learned ranges.
    """

    name: str
    learned_ranges: bool | None = None
    param_dtype: torch.dtype = torch.float32
    range_lr: float = 1e-4

    @property
    def scheme(self) -> Scheme:
        """The scheme, with ranges as chosen."""
        scheme = SCHEMES[self.name]
        if self.learned_ranges is None:
            return scheme
        return replace(scheme, weights=replace(scheme.weights, learned=self.learned_ranges))


class QuantizedLinear(nn.Linear):
    """x Wᵀ, W and, where the scheme says so, x as they are after rounding."""

    quantization: StudentQuantization
    weight_scales: nn.Parameter | None

    def __init__(self, plain: nn.Linear, quantization: StudentQuantization, name: str) -> None:
        """Takes the place, and the weight, of `plain`; raises ValueError where its rows do not divide into groups."""
        assert plain.bias is None
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.quantization = quantization
        _add_ranges(self, RANGES[:1], name)

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., R]."""
        weight = _as_stored(self.weight, self.weight_scales, self.quantization)
        return F.linear(_as_read(input, self.quantization.scheme), weight)


class QuantizedEmbedding(nn.Embedding):
    """The table of lookup and head: quantized once where they share it, twice where each has its ranges."""

    quantization: StudentQuantization
    weight_scales: nn.Parameter | None
    head_scales: nn.Parameter | None

    def __init__(self, plain: nn.Embedding, quantization: StudentQuantization, name: str) -> None:
        """Takes the place, and the weight, of `plain`; raises ValueError where its rows do not divide into groups."""
        super().__init__(plain.num_embeddings, plain.embedding_dim, device="meta")
        self.weight = plain.weight
        self.quantization = quantization
        self.head_scales = None
        _add_ranges(self, RANGES[:1] if quantization.scheme.shared_table else RANGES, name)
        self._table: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[...] ids -> [..., C]; the table is kept for `head`."""
        self._table = _as_stored(self.weight, self.weight_scales, self.quantization)
        return F.embedding(input, self._table)

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[..., C] -> what the head multiplies: hidden states [..., C] and weight [R, C]; after the lookup."""
        table, self._table = self._table, None
        assert table is not None, "the head comes after the lookup"
        if self.head_scales is not None:
            table = _as_stored(self.weight, self.head_scales, self.quantization)
        return _as_read(hidden, self.quantization.scheme), table


def quantize_modules(model: nn.Module, quantization: StudentQuantization) -> None:
    """Puts quantized modules in the place of all linear layers and the embedding, and rounds keys and values.

    Args:
        model: a student, in memory or on the meta device; learned ranges of one in memory begin at the computed ones.
        quantization: how; `model.quantization` afterwards.

    Raises:
        ValueError: a width that does not divide into groups, with the layer's name; or it is quantized already.
    """
    if model.quantization is not None:
        raise ValueError("this student is quantized already; begin with one in full precision")
    model.quantization = quantization
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            _replace(model, name, QuantizedLinear(module, quantization, name))
        elif isinstance(module, nn.Embedding):
            _replace(model, name, QuantizedEmbedding(module, quantization, name))
        elif hasattr(module, "stored") and quantization.scheme.cache == "int8":
            module.stored = fake_quantize_tokens
    if not any(parameter.is_meta for parameter in model.parameters()):
        begin_ranges(model)


def is_range(name: str) -> bool:
    """Whether a parameter of this name is a learned range."""
    return name.rpartition(".")[2] in RANGES


@torch.no_grad()
def begin_ranges(model: nn.Module) -> None:
    """Sets learned ranges to those that follow from the weights, on every layout; without any it does nothing."""
    for module in model.modules():
        for scales in _ranges(module):
            assert isinstance(module, (QuantizedLinear, QuantizedEmbedding))
            quantization = module.quantization
            computed: Tensor = choose_scales(module.weight.to(quantization.param_dtype), quantization.scheme.weights)
            if isinstance(scales, DTensor):
                assert isinstance(computed, DTensor)
                computed = computed.redistribute(scales.device_mesh, scales.placements)
            scales.copy_(computed)


def _ranges(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters(recurse=False) if name in RANGES)


def _add_ranges(module: QuantizedLinear | QuantizedEmbedding, names: tuple[str, ...], name: str) -> None:
    """Empty parameters for learned ranges; None where they are computed."""
    module.weight_scales = None
    weights, weight = module.quantization.scheme.weights, module.weight
    groups = weight.shape[1] // weights.group_of(weight.shape[1], name)
    if weights.learned:
        for own in names:
            setattr(module, own, nn.Parameter(weight.new_empty(weight.shape[0], groups, dtype=torch.float32)))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _as_stored(weight: Tensor, scales: Tensor | None, quantization: StudentQuantization) -> Tensor:
    """[R, C] -> [R, C] in its own type, with the values of the type that is trained in."""
    rounded, scheme = weight.to(quantization.param_dtype), quantization.scheme.weights
    stored = fake_quantize(rounded, scheme) if scales is None else fake_quantize_learned(rounded, scales, scheme)
    return stored.to(weight.dtype)


def _as_read(x: Tensor, scheme: Scheme) -> Tensor:
    """[..., C] -> [..., C]."""
    return x if scheme.activation_bits is None else fake_quantize_tokens(x, scheme.activation_bits)
