"""Export of a quantized student to ExecuTorch, which counts only after the program has run and said what it should.

The reference is the same decoder in eager torch, with its quantized arithmetic. The program prefills ten prompts, from
one token to longer than a local layer's ring, and continues them greedily; the reference then reads prompts and
continuations at once. So the program's long chunks and its single tokens are held against the same numbers.

Logits agree but for rounding: sums are taken in another order, and where an activation lies between two int8 steps that
decides about the step. At most tokens none does, and logits agree to a few millionths; one step more or less moves them
by up to a tenth in a model 96 wide, by thousandths in the 1B. So the median over tokens is bounded closely, and the
largest loosely. Differences are in standard deviations of the logits of a token, since logits have no unit.

Schemes with float activations are refused, the accelerator's for one. The partitioner for XNNPACK takes int4 weights
with int8 activations only. Core ML's takes such a linear layer, also on Linux, but its programs run on Apple's
machines, and a program that cannot run where it is exported is not exported.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mobilellm_pro.config import cpu_device
from mobilellm_pro.convert.conversion import whole_folder
from mobilellm_pro.convert.executorch_decoder import Decoder
from mobilellm_pro.convert.executorch_lowering import write_program
from mobilellm_pro.convert.executorch_runtime import DATA_FILE, PROGRAM_FILE, DeviceProgram, import_executorch
from mobilellm_pro.convert.quantized_model import QuantizedModel, norm_shapes, weight_shapes
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight
from mobilellm_pro.quantization.scheme import Scheme
from mobilellm_pro.quantization.weight_quantizer import SCALE_DTYPE, refuse_non_finite

MEDIAN_TOLERANCE, TOLERANCE = 0.05, 0.25
"""Of the largest difference of a token's logits: in the median over tokens, and at all. A wrong table makes 1 and more.
"""

TIE = 0.1
"""Logits this near are equal, since one step of one activation moves them so far: either may be the likelier token."""

NUM_PROMPTS, NEW_TOKENS = 10, 8
LEAST_TOKENS = 32
GROUP_MULTIPLE = 32
"""XNNPACK's kernels read weights in groups of a multiple of this."""

Entry = TypeVar("Entry")

_ADVICE = "nothing was written; see that executorch and torch are versions that this project names"

_NO_SCALE = 2.0**-100
"""In the place of the scale 0 of a group of zeros, which XNNPACK does not take."""


@dataclass(frozen=True)
class Comparison:
    """A program beside its reference.

    Attributes:
        num_tokens: greedy tokens compared.
        num_ties: of these, where the two chose different ones of two equal logits (TIE).
        largest_difference: of all logits at these tokens, in standard deviations.
        median_difference: half of the tokens have no larger one.
    """

    num_tokens: int
    num_ties: int
    largest_difference: float
    median_difference: float


@dataclass(frozen=True)
class ExecutorchReport:
    """What was written and how it ran.

    Attributes:
        program_bytes: of model.pte.
        data_bytes: of model.ptd.
        cache_bytes: of keys and values with their ranges, in the program's memory.
        comparison: with the eager decoder.
        lowering_seconds: to trace, lower and write.
        comparison_seconds: to load, run and compare.
        peak_bytes: most resident memory of this process so far.
    """

    program_bytes: int
    data_bytes: int
    cache_bytes: int
    comparison: Comparison
    lowering_seconds: float
    comparison_seconds: float
    peak_bytes: int


def export_executorch(
    model: QuantizedModel, folder: str | Path, *, max_tokens: int, overwrite: bool = False
) -> ExecutorchReport:
    """Writes model.pte and model.ptd, runs them, and puts them in place if they compute what the eager model computes.

    Args:
        model: of a scheme that `check_exportable` takes, "cpu" for one.
        folder: to write; it is there as a whole or not at all.
        max_tokens: room for tokens, prompt and continuation together.
        overwrite: replace a folder that is there already.

    Raises:
        ExecutorchMissing: it is not installed.
        ValueError: the model cannot be exported, the folder exists, or the program differs from the eager model; in
            the last case nothing is left.
    """
    target = Path(folder)
    import_executorch()
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; remove it, choose another folder or say --overwrite")
    check_exportable(model, max_tokens)
    decoder = decoder_of(model, max_tokens)
    with whole_folder(target) as temporary:
        begin = time.perf_counter()
        write_program(decoder, temporary)
        gc.collect()  # graphs refer to themselves, and hold weights
        written = time.perf_counter()
        comparison = compare(DeviceProgram(temporary), decoder)
        check(comparison)
        return ExecutorchReport(
            program_bytes=(temporary / PROGRAM_FILE).stat().st_size,
            data_bytes=(temporary / DATA_FILE).stat().st_size,
            cache_bytes=decoder.cache_bytes,
            comparison=comparison,
            lowering_seconds=written - begin,
            comparison_seconds=time.perf_counter() - written,
            peak_bytes=cpu_device.memory_stats()["active_bytes.all.peak"],
        )


def check_exportable(model: QuantizedModel, max_tokens: int) -> None:
    """
    Raises:
        ValueError: the scheme has no kernels, tensors are missing, of another shape or not finite, or there is too
            little room for tokens.
    """
    _check_scheme(model.scheme_name, model.scheme)
    if max_tokens < LEAST_TOKENS:
        raise ValueError(f"max_tokens = {max_tokens}; expected at least {LEAST_TOKENS}")
    for name, shape in weight_shapes(model.args, model.scheme).items():
        _check_weight(name, _entry(model.weights, name), shape)
    for name, width in norm_shapes(model.args).items():
        norm = _entry(model.norms, name)
        if tuple(norm.shape) != width:
            raise ValueError(f"{name}: {list(norm.shape)} numbers; this architecture has {list(width)}")
        refuse_non_finite(name, norm)


def _check_scheme(name: str, scheme: Scheme) -> None:
    group = scheme.weights.group
    wants = {
        "weights of 4 bits": scheme.weights.bits == 4,
        f"weights in groups of a multiple of {GROUP_MULTIPLE}": group is not None and group % GROUP_MULTIPLE == 0,
        "activations of 8 bits": scheme.activation_bits == 8,
        "a cache in int8": scheme.cache == "int8",
        "one table for embedding and head": scheme.shared_table,
    }
    if lacking := [want for want, there in wants.items() if not there]:
        raise ValueError(
            f'scheme "{name}" cannot be exported to ExecuTorch: its XNNPACK kernels want {", ".join(lacking)}, as the '
            'scheme "cpu" has; models of other schemes go to packed and torchao folders'
        )


def _entry(entries: Mapping[str, Entry], name: str) -> Entry:
    if name not in entries:
        raise ValueError(f"{name} is missing; quantize the checkpoint again")
    return entries[name]


def _check_weight(name: str, weight: QuantizedWeight, shape: tuple[int, int]) -> None:
    integers, scales = weight
    if tuple(integers.shape) != shape or scales.shape[0] != shape[0] or shape[1] % (scales.shape[1] * GROUP_MULTIPLE):
        raise ValueError(
            f"{name}: integers {list(integers.shape)} and scales {list(scales.shape)}; this architecture has "
            f"{list(shape)}, in groups of a multiple of {GROUP_MULTIPLE}"
        )
    refuse_non_finite(f"the scales of {name}", scales)
    if integers.dtype != torch.int8 or int(integers.min()) < -8 or int(integers.max()) > 7:
        raise ValueError(f"{name}: {integers.dtype} from {integers.min()} to {integers.max()}; expected int8, -8 to 7")
    if scales.dtype != SCALE_DTYPE:
        raise ValueError(f"{name}: scales in {scales.dtype}; XNNPACK stores {SCALE_DTYPE}, so train and quantize so")
    if bool(((scales < torch.finfo(SCALE_DTYPE).tiny) & (scales != 0)).any()):
        raise ValueError(
            f"{name}: a scale of {float(scales[scales != 0].min()):.1e}, negative or too small for XNNPACK's kernels; "
            "weights so near zero do nothing: set them to 0"
        )


def decoder_of(model: QuantizedModel, max_tokens: int) -> Decoder:
    """The eager decoder with the model's integers, scales and norms."""
    weights = {name: _with_positive_scales(weight) for name, weight in model.weights.items()}
    return Decoder(model.args, weights, model.norms, max_tokens)


def _with_positive_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """Groups of scale 0 get another scale and keep their zeros."""
    empty = weight.scales == 0
    if not bool(empty.any()):
        return weight
    groups = weight.integers.unflatten(-1, (weight.scales.shape[1], -1))
    integers = torch.where(empty.unsqueeze(-1), 0, groups).flatten(-2)
    return QuantizedWeight(integers, torch.where(empty, _NO_SCALE, weight.scales).to(SCALE_DTYPE))


@torch.no_grad()
def compare(program: DeviceProgram, decoder: Decoder, num_prompts: int = NUM_PROMPTS) -> Comparison:
    """Runs both.

    Args:
        program: what the decoder was exported to.
        decoder: the reference.
        num_prompts: of random ids, evenly from one token to a quarter longer than the longest chunk.
    """
    generator = torch.Generator().manual_seed(0)
    longest = min(decoder.max_tokens - NEW_TOKENS, decoder.chunk_tokens * 5 // 4)
    ties, differences = 0, torch.empty(0)
    for length in torch.linspace(1, longest, num_prompts).long().tolist():
        prompt = torch.randint(decoder.args.vocab_size, (length,), generator=generator).tolist()
        program.reset()
        tokens, theirs = prompt, []
        for _ in range(NEW_TOKENS):
            theirs.append(program.extend(tokens[program.num_tokens :]))
            tokens = [*tokens, int(theirs[-1].argmax())]
        ours = eager_logits(decoder, tokens[:-1], NEW_TOKENS)
        scale = ours.std(dim=-1, keepdim=True)
        apart = ((torch.stack(theirs) - ours) / scale).abs().amax(dim=-1).nan_to_num(nan=torch.inf)
        differences = torch.cat((differences, apart))
        chosen = ours.gather(-1, torch.tensor(tokens[-NEW_TOKENS:]).unsqueeze(-1))
        behind = (ours.amax(dim=-1, keepdim=True) - chosen) / scale
        if bool((behind > TIE).any()):
            raise ValueError(
                f"the exported program continues a prompt of {length} tokens with {tokens[-NEW_TOKENS:]}, the eager "
                f"model with {ours.argmax(dim=-1).tolist()}; their logits differ by up to {float(apart.max()):.1e} "
                f"standard deviations: {_ADVICE}"
            )
        ties += int((behind > 0).sum())
    return Comparison(len(differences), ties, float(differences.max()), float(differences.median()))


def eager_logits(decoder: Decoder, tokens: list[int], count: int) -> Tensor:
    """Logits of the last `count` of N tokens, fp32 [count, V]."""
    hidden, start = [], 0
    for chunk in torch.tensor([tokens]).split(decoder.chunk_tokens, dim=1):
        hidden.append(decoder.hidden(chunk, torch.tensor([start])))
        start += chunk.shape[1]
    return decoder.table.logits(torch.cat(hidden, dim=1)[:, -count:])[0]


def check(comparison: Comparison) -> None:
    """
    Raises:
        ValueError: logits differ by more than the tolerances.
    """
    largest, median = comparison.largest_difference, comparison.median_difference
    if not (largest <= TOLERANCE and median <= MEDIAN_TOLERANCE):
        raise ValueError(
            f"logits of the exported program differ from the eager model's by up to {largest:.2g} standard deviations, "
            f"{median:.2g} in the median over tokens; up to {TOLERANCE} and {MEDIAN_TOLERANCE} are rounding: {_ADVICE}"
        )
