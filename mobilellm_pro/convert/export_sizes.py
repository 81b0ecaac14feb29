"""Bytes of a student's numbers in every form that it ships in, by arithmetic from shapes and types.

A file has a header beside them, tens of kilobytes, and a folder the tokenizer. MB are 1e6 bytes.
"""

from typing import NamedTuple

import torch

from mobilellm_pro.convert.quantized_model import HEAD, TABLE, norm_shapes, weight_shapes
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.quantization.scheme import Scheme, WeightScheme
from mobilellm_pro.quantization.weight_quantizer import SCALE_DTYPE

_NORM = torch.float32.itemsize


class ExportBytes(NamedTuple):
    """Of the tensors of one form of a student."""

    weights: int
    """Integers, or floating-point numbers where nothing is quantized."""

    scales: int
    """Ranges of the weights, and zero points where a format stores them."""

    norms: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def plain_bytes(args: StudentArgs, dtype: torch.dtype) -> ExportBytes:
    """Nothing quantized, embedding and head one table, norms in the same type."""
    numbers = sum(rows * columns for rows, columns in weight_shapes(args, Scheme()).values())
    norms = sum(width for (width,) in norm_shapes(args).values())
    return ExportBytes(numbers * dtype.itemsize, 0, norms * dtype.itemsize)


def packed_bytes(args: StudentArgs, scheme: Scheme, table: WeightScheme | None = None) -> ExportBytes:
    """Two integers a byte, scales in bfloat16, norms in float32: `packed_folder`, and about what a program stores.

    Args:
        args: the architecture.
        scheme: of four bits.
        table: how embedding and head are quantized, if other than linear layers; no scheme of SCHEMES does this.
    """
    return _bytes(args, scheme, table, per_pair=1, per_scale=SCALE_DTYPE.itemsize)


def torchao_bytes(args: StudentArgs, scheme: Scheme) -> ExportBytes:
    """A byte an integer, scales in bfloat16 and a byte of zero point for each, norms in float32: `torchao_folder`."""
    return _bytes(args, scheme, None, per_pair=2, per_scale=SCALE_DTYPE.itemsize + 1)


def _bytes(args: StudentArgs, scheme: Scheme, table: WeightScheme | None, per_pair: int, per_scale: int) -> ExportBytes:
    integers = scales = 0
    for name, (rows, columns) in weight_shapes(args, scheme).items():
        own = table if table is not None and name in (TABLE, HEAD) else scheme.weights
        integers += rows * columns // 2 * per_pair
        scales += rows * (columns // own.group_of(columns, name)) * per_scale
    return ExportBytes(integers, scales, sum(width for (width,) in norm_shapes(args).values()) * _NORM)
