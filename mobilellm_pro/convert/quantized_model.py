"""A student as it ships: integers, scales and norms, from which every export is written and nothing rounded again.

Two kinds of students become one. A student that trained quantized brings its ranges along, learned or to be computed
as training computed them, and the integers here are those that it was trained with. A full-precision student is rounded
to nearest under ranges of its weights: post-training quantization, `trained = False`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchtitan.config import TORCH_DTYPE_MAP

from mobilellm_pro.model.quantized_modules import QuantizedEmbedding, StudentQuantization
from mobilellm_pro.model.student import Student, StudentArgs
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight, quantize_weight
from mobilellm_pro.quantization.scheme import SCHEMES, Scheme, WeightScheme
from mobilellm_pro.quantization.weight_quantizer import SCALE_DTYPE, refuse_non_finite

TABLE, HEAD = "embed_tokens.weight", "lm_head.weight"
"""The embedding, and the head where it is a table of its own; `Student` itself has no head."""

_BLOCK_WEIGHTS = 2**24
"""Quantized at a time: quotients are taken in float64, which of a whole embedding would be gigabytes."""


@dataclass(frozen=True)
class QuantizedModel:
    """All numbers of a quantized student, on the CPU.

    Attributes:
        args: its architecture.
        scheme_name: key of SCHEMES.
        scheme: what is quantized how; that of SCHEMES, but for whether ranges were learned.
        weights: name in `Student.state_dict()` -> integers [R, C] and scales [R, G] of every linear layer and of the
            embedding, and under "lm_head.weight" of the head where scheme.shared_table is False.
        norms: name -> weight of every RMSNorm, float32 [D].
        tokenizer: source for `Tokenizer.load`.
        max_tokens: longest row that it was trained on.
        trained: whether it trained quantized; else it was rounded to nearest afterwards.
    """

    args: StudentArgs
    scheme_name: str
    scheme: Scheme
    weights: Mapping[str, QuantizedWeight]
    norms: Mapping[str, Tensor]
    tokenizer: str
    max_tokens: int
    trained: bool

    @property
    def dtype(self) -> str:
        """Of the numbers between layers: "float32" where activations are integers, else "bfloat16"."""
        return "bfloat16" if self.scheme.activation_bits is None else "float32"

    @property
    def quantization(self) -> StudentQuantization:
        """How a student that computes like this one is quantized."""
        return StudentQuantization(self.scheme_name, self.scheme.weights.learned, TORCH_DTYPE_MAP[self.dtype])


def scheme_named(name: str) -> Scheme:
    """One of SCHEMES.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in SCHEMES:
        raise ValueError(f'quantization scheme "{name}"; expected one of {", ".join(SCHEMES)}')
    return SCHEMES[name]


def student_on_meta(args: StudentArgs) -> Student:
    """A student without numbers: names and shapes."""
    with torch.device("meta"):
        return Student(args)


def weight_shapes(args: StudentArgs, scheme: Scheme) -> dict[str, tuple[int, int]]:
    """Name -> rows and columns of everything that the scheme quantizes."""
    parameters = student_on_meta(args).named_parameters()
    shapes = {name: (p.shape[0], p.shape[1]) for name, p in parameters if p.ndim == 2}
    return shapes if scheme.shared_table else {**shapes, HEAD: shapes[TABLE]}


def norm_shapes(args: StudentArgs) -> dict[str, tuple[int]]:
    """Name -> width of every norm."""
    return {name: (p.shape[0],) for name, p in student_on_meta(args).named_parameters() if p.ndim == 1}


@torch.no_grad()
def quantize_student(student: Student, scheme_name: str, tokenizer: str, max_tokens: int) -> QuantizedModel:
    """The integers that a quantized student was trained with, or those nearest to a full-precision one.

    Args:
        student: on the CPU. One that `quantize_modules` changed counts as trained so, and its own settings hold:
            whether ranges were learned, and the type that weights and norms are rounded to before anything else.
        scheme_name: "cpu" or "accelerator".
        tokenizer: source for `Tokenizer.load`.
        max_tokens: longest row that it was trained on.

    Raises:
        ValueError: the student was trained with another scheme, lacks ranges that it should have learned, has others
            that the scheme has no place for, or has NaN or infinite numbers; the tensor is named.
    """
    scheme, dtype, trained = scheme_named(scheme_name), torch.float32, student.quantization
    if trained is not None:
        _refuse_other_training(student, trained.name, scheme_name)
        scheme, dtype = trained.scheme, trained.param_dtype
    args, state = student.model_args, student.state_dict()
    shapes, norms = weight_shapes(args, scheme), norm_shapes(args)
    learned = trained is not None and scheme.weights.learned
    ranges = {name: _name_of_ranges(name) for name in shapes} if learned else {}
    _refuse_other_tensors(set(state) - set(shapes) - set(norms), set(ranges.values()), scheme_name)
    weights = {
        name: _quantize(name, state[TABLE if name == HEAD else name], scheme.weights, dtype, ranges, state)
        for name in shapes
    }
    rounded = {name: _norm(name, state[name], dtype) for name in norms}
    return QuantizedModel(args, scheme_name, scheme, weights, rounded, tokenizer, max_tokens, trained is not None)


def _refuse_other_training(student: Student, trained_with: str, scheme_name: str) -> None:
    if trained_with != scheme_name:
        raise ValueError(
            f'this student was trained with the quantization scheme "{trained_with}" and cannot be exported with '
            f'"{scheme_name}": its weights fit the ranges of the former; ask for "{trained_with}", or quantize the '
            "full-precision checkpoint that it began from"
        )
    if not isinstance(student.embed_tokens, QuantizedEmbedding):
        raise ValueError(
            "this student holds weights that were quantized already, and would be rounded twice; export the quantized "
            "model that it was made of"
        )


def _name_of_ranges(name: str) -> str:
    """Of what training learned for a weight; the embedding carries those of the head too."""
    return "embed_tokens.head_scales" if name == HEAD else name.removesuffix("weight") + "weight_scales"


def _refuse_other_tensors(there: set[str], wanted: set[str], scheme_name: str) -> None:
    """Ranges that are missing would be computed instead, ranges too many would be dropped: both in silence."""
    if missing := sorted(wanted - there):
        raise ValueError(
            f'the checkpoint of a student trained with "{scheme_name}" lacks learned ranges: {", ".join(missing)}; '
            "take the checkpoint that training wrote, with all of its tensors"
        )
    if extra := sorted(there - wanted):
        raise ValueError(
            f'scheme "{scheme_name}" has no place for {", ".join(extra)}; export with the scheme that the student was '
            "trained with"
        )


def _quantize(
    name: str,
    weight: Tensor,
    scheme: WeightScheme,
    dtype: torch.dtype,
    ranges: Mapping[str, str],
    state: Mapping[str, Tensor],
) -> QuantizedWeight:
    """Row blocks of a weight one after another."""
    refuse_non_finite(name, weight)
    scales = state[ranges[name]] if name in ranges else None
    expected = (weight.shape[0], weight.shape[1] // scheme.group_of(weight.shape[1], name))
    if scales is not None:
        refuse_non_finite(ranges[name], scales)
        if tuple(scales.shape) != expected:
            raise ValueError(f"{ranges[name]}: learned ranges {list(scales.shape)}; {name} needs {list(expected)}")
    rows = max(1, _BLOCK_WEIGHTS // weight.shape[1])
    integers, all_scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(expected, dtype=SCALE_DTYPE)
    for first in range(0, weight.shape[0], rows):
        block = slice(first, first + rows)
        learned = None if scales is None else scales[block]
        integers[block], all_scales[block] = quantize_weight(name, weight[block].to(dtype), scheme, learned)
    return QuantizedWeight(integers, all_scales)


def _norm(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    refuse_non_finite(name, weight)
    return weight.to(dtype).to(torch.float32, copy=True)
