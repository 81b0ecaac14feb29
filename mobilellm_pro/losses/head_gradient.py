"""The gradient of an output head, summed over chunks of tokens in fp32.

In bf16 a running sum loses each chunk's last bits; over hundreds of chunks it stops moving. The fp32 sum lives in
blocks of rows, so that the conversion at the end frees one block after the other and never holds both in full.

Shape suffixes: C tokens of a chunk, V vocabulary slice of this rank, R rows of a block, D student width.
"""

import torch
from torch import Tensor

# Above 32 MiB each, the C library gives a freed block back to the system.
STORED_ROWS = 8192
# A bf16 product of this many rows is still in cache when it is added.
ADDED_ROWS = 4096


class HeadGradient:
    """Call `add` for each of `num_chunks` chunks, then `result` once: [V, D] in the dtype of the head."""

    def __init__(self, head_VD: Tensor, num_chunks: int) -> None:
        self.head_VD = head_VD
        self.started = False
        # One chunk needs no sum, and fp32 (or fp64) heads need no conversion: both use the result itself.
        self.in_place = num_chunks <= 1 or head_VD.dtype != torch.bfloat16
        if self.in_place:
            self.blocks = [torch.empty_like(head_VD, memory_format=torch.contiguous_format)]
        else:
            stored = STORED_ROWS if head_VD.device.type == "cpu" else head_VD.shape[0]
            self.blocks = [torch.empty_like(b, dtype=torch.float32) for b in head_VD.split(stored)]

    def add(self, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
        begin = 0
        for block_RD in self.blocks:
            columns_RC = gradient_CV[:, begin : begin + block_RD.shape[0]].T
            begin += block_RD.shape[0]
            if self.in_place:
                torch.addmm(block_RD, columns_RC, hidden_CD, beta=int(self.started), out=block_RD)
            elif block_RD.is_cuda:
                beta = int(self.started)
                torch.addmm(block_RD, columns_RC, hidden_CD, out_dtype=torch.float32, beta=beta, out=block_RD)
            else:
                self._add_converted(block_RD, columns_RC, hidden_CD)
        self.started = True

    def _add_converted(self, block_RD: Tensor, columns_RC: Tensor, hidden_CD: Tensor) -> None:
        for sums, columns in zip(block_RD.split(ADDED_ROWS), columns_RC.split(ADDED_ROWS), strict=True):
            product = columns @ hidden_CD
            sums.add_(product) if self.started else sums.copy_(product)

    def result(self) -> Tensor:
        if not self.started:
            return torch.zeros_like(self.head_VD)
        if self.in_place:
            return self.blocks[0]
        result_VD, begin = torch.empty_like(self.head_VD, memory_format=torch.contiguous_format), 0
        while self.blocks:
            block_RD = self.blocks.pop(0)
            result_VD[begin : begin + block_RD.shape[0]] = block_RD
            begin += block_RD.shape[0]
            del block_RD
        return result_VD
