"""Keys and values on their way between the ranks of a context-parallel group: one all-to-all, and its way back.

Every rank sends each other rank just the tokens that this one's queries may see (`row_shard.key_exchange`): a local
layer the window - 1 tokens before a border, a chunked layer the rest of the chunk, a global layer everything before.
Backward, gradients travel the other way and are summed in fp32, always in the order of the ranks.

Shapes: B rows, G key/value heads, S tokens of a row on this rank, K keys that its queries may see, W head width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mobilellm_pro.model.row_shard import KeyExchange


def exchange_keys(key: Tensor, value: Tensor, exchange: KeyExchange, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[B, G, S, W] of this rank's tokens -> [B, G, K, W] in the order of the row; every rank of the group calls it."""
    joined_key, joined_value = _Exchange.apply(torch.stack((key, value)), exchange, group).unbind(0)
    return joined_key, joined_value


class _Exchange(torch.autograd.Function):
    """[2, B, G, S, W] of this rank -> [2, B, G, K, W]; also backward, every rank of the group takes part."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, exchange: KeyExchange, group: dist.ProcessGroup) -> Tensor:
        ctx.exchange, ctx.group, ctx.num_tokens = exchange, group, local.shape[-2]
        by_token = local.movedim(-2, 0)
        parts = [by_token[begin:end] for intervals in exchange.sent for begin, end in intervals]
        sent = torch.cat(parts) if parts else by_token[:0]
        others = _all_to_all(sent.contiguous(), exchange.sent_tokens, exchange.received, group).movedim(0, -2)
        stretches = [(others if received else local)[..., begin:end, :] for received, begin, end in exchange.assembly]
        return torch.cat(stretches, dim=-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exchange: KeyExchange = ctx.exchange
        by_token = grad.movedim(-2, 0)
        shape = by_token.shape[1:]
        total = by_token.new_empty(ctx.num_tokens, *shape, dtype=torch.float32)
        others = by_token.new_empty(sum(exchange.received), *shape)
        offset = 0
        for received, begin, end in exchange.assembly:
            (others if received else total)[begin:end] = by_token[offset : offset + end - begin]
            offset += end - begin
        returned = _all_to_all(others, exchange.received, exchange.sent_tokens, ctx.group)
        offset = 0
        for begin, end in (interval for intervals in exchange.sent for interval in intervals):
            total[begin:end] += returned[offset : offset + end - begin]
            offset += end - begin
        return total.to(grad.dtype).movedim(0, -2), None, None


def _all_to_all(sent: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """[sent tokens, ...] ordered by target -> [received tokens, ...] ordered by source."""
    received = sent.new_empty(sum(receive), *sent.shape[1:])
    dist.all_to_all_single(received, sent, list(receive), list(send), group=group)
    return received
