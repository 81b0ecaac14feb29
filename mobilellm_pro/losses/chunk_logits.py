"""Logits of one chunk of tokens, in memory that is reused from chunk to chunk, and the product that makes them.

bf16 logits of a student close to its teacher differ by little more than their own rounding, which then is a tenth of
the gradient. The accurate mode takes logits to fp32 without leaving the fast bf16 product: the product is rounded to
bf16 once, and a second product that starts from minus this value leaves the rounding error, again in bf16. The sum of
the two is good to about 2^-17. Accelerators that can write fp32 from a bf16 product do that instead.

Shape suffixes: C tokens of a chunk, N tokens of a tile, V vocabulary slice of this rank, D width.
"""

import torch
from torch import Tensor

# Rows of the head per product in fp32 on CPU, few enough for a cache. The library packs the right-hand matrix, which is
# the head. Where tokens are few beside the width, that costs as much as the product: with the head on the left it packs
# the hidden states, at the price of a copy that turns the result around.
BLOCK_ROWS = 2048
FEW_TOKENS = 1 / 6  # times the width


class ChunkLogits:
    """`compute` fills them, `tile` reads some rows in fp32 (fp64 stays), `gradient_CV` is where gradients are written.

    The gradient takes the place of the logits wherever their dtype is that of the head, so a tile is read first.
    """

    def __init__(self, head_VD: Tensor, chunk_tokens: int, fp32_logits: bool) -> None:
        shape = (chunk_tokens, head_VD.shape[0])
        refine = fp32_logits and head_VD.dtype == torch.bfloat16
        self.head_VD = head_VD
        self.native_fp32 = refine and head_VD.is_cuda
        self._values = head_VD.new_empty(shape, dtype=torch.float32 if self.native_fp32 else head_VD.dtype)
        self._low = head_VD.new_empty(shape) if refine and not self.native_fp32 else None
        self._gradient = head_VD.new_empty(shape) if self.native_fp32 else self._values
        self.num_tokens = 0

    @staticmethod
    def bytes_per_logit(head_VD: Tensor, fp32_logits: bool) -> int:
        """Bytes of one logit and of what the accurate mode keeps beside it.

        In that mode, an accelerator holds the gradient apart from the fp32 logits, and a CPU the refinement, plus what
        its product copies while it runs; student and teacher run in turn, so half of that copy counts for each.
        """
        if fp32_logits and head_VD.dtype == torch.bfloat16:
            return 6 if head_VD.is_cuda else 5
        return head_VD.element_size()

    @property
    def values_CV(self) -> Tensor:
        """[C, V] as the product wrote them; in the accurate mode on CPU they lack the refinement that `tile` adds."""
        return self._values[: self.num_tokens]

    @property
    def gradient_CV(self) -> Tensor:
        return self._gradient[: self.num_tokens]

    def compute(self, hidden_CD: Tensor) -> None:
        self.num_tokens = hidden_CD.shape[0]
        if self.native_fp32:
            torch.mm(hidden_CD, self.head_VD.T, out_dtype=torch.float32, out=self.values_CV)
        elif self._values.device.type == "cpu" and self._values.dtype != torch.bfloat16:
            _product_by_blocks(hidden_CD, self.head_VD, self.values_CV)
        else:
            torch.mm(hidden_CD, self.head_VD.T, out=self.values_CV)
        if self._low is not None:
            low_CV = self._low[: self.num_tokens]
            torch.addmm(self.values_CV, hidden_CD, self.head_VD.T, beta=-1, out=low_CV)

    def tile(self, rows: slice, out_NV: Tensor) -> Tensor:
        """[N, V] logits of these tokens in the dtype of `out_NV`, which is fp32 or fp64.

        Filled into `out_NV` where they are stored otherwise, else a view of the logits: not to be written.
        """
        values_NV = self.values_CV[rows]
        if values_NV.dtype != out_NV.dtype:
            values_NV = out_NV.copy_(values_NV)
        return values_NV if self._low is None else values_NV.add_(self._low[: self.num_tokens][rows])


def _product_by_blocks(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor) -> None:
    num_tokens, width = hidden_CD.shape
    hidden_DC = hidden_CD.T.contiguous() if num_tokens <= FEW_TOKENS * width else None
    for begin in range(0, head_VD.shape[0], BLOCK_ROWS):
        block = slice(begin, begin + BLOCK_ROWS)
        if hidden_DC is None:
            torch.mm(hidden_CD, head_VD[block].T, out=out_CV[:, block])
        else:
            out_CV[:, block].copy_((head_VD[block] @ hidden_DC).T)
