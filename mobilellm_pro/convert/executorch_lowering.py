"""A decoder as two files: the program `model.pte` and its weights `model.ptd`.

XNNPACK takes linear layers, with dynamically quantized input and int4 weights in groups, and chains of elementwise
operators; the rest are ExecuTorch's own kernels. All weights lie outside of the program under the hash of their bytes,
so that what two kernels read alike, the table of embedding and head, is stored once.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram, export

from mobilellm_pro.convert.executorch_decoder import Decoder
from mobilellm_pro.convert.executorch_runtime import DATA_FILE, PROGRAM_FILE, import_executorch

_ALIGNMENT = 16
"""Of constants, in bytes, as XNNPACK wants it; there are thousands of small ones."""

_DATA_NAME = DATA_FILE.removesuffix(".ptd")


def write_program(decoder: Decoder, folder: Path) -> None:
    """Traces a decoder, lowers it and writes both files.

    Args:
        decoder: on the CPU.
        folder: that exists.

    Raises:
        ExecutorchMissing: it is not installed.
    """
    import_executorch()
    with warnings.catch_warnings(), torch.no_grad():
        # Of its own interfaces, and that a cache's first content is not stored: nothing reads it.
        warnings.simplefilter("ignore")
        manager = _lower(_trace(decoder), decoder)
    with (folder / PROGRAM_FILE).open("wb") as file:
        manager.write_to_file(file)
    manager.write_tensor_data_to_file(str(folder))


def _trace(decoder: Decoder) -> ExportedProgram:
    """For chunks of any length; every constant says that it belongs outside of the program."""
    from executorch.exir.passes.external_constants_pass import delegate_external_constants_pass_unlifted

    tokens = torch.zeros(1, max(2, decoder.chunk_tokens // 2), dtype=torch.int64)
    inputs = (tokens, torch.zeros(1, dtype=torch.int64))
    shapes = ({1: Dim("tokens", min=1, max=decoder.chunk_tokens)}, None)
    traced = export(decoder.eval(), inputs, dynamic_shapes=shapes, strict=False).module()
    delegate_external_constants_pass_unlifted(traced, _outside)
    return export(traced, inputs, dynamic_shapes=shapes, strict=False)


def _lower(traced: ExportedProgram, decoder: Decoder) -> Any:
    """ExecuTorch's program manager, ready to be written."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(
        traced,
        partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods={
            "max_tokens": decoder.max_tokens,
            "chunk_tokens": decoder.chunk_tokens,
            "vocab_size": decoder.args.vocab_size,
        },
    )
    # There is nothing to fuse, since operators are called by name, and folding would make short norms long.
    return edge.to_executorch(ExecutorchBackendConfig(external_constants=_outside, segment_alignment=_ALIGNMENT))


def _outside(node: fx.Node) -> str:
    return _DATA_NAME
