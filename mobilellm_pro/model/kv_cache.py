"""Keys and values of earlier tokens, for generation: everything in global layers, the last window in local ones.

Shapes: B rows, G key/value heads, K cached tokens, S new tokens, W head width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mobilellm_pro.model.attention import Span

LayerStore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(new keys, new values) [B, G, S, W] -> (all visible keys, values) [B, G, K + S, W]."""


class KVCache:
    """Cache of one batch of sequences of equal length."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, span: Span) -> LayerStore:
        """The function through which layer `index` stores its keys and values and gets back what it may see."""

        def extend(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            if index in self._layers:
                old_key, old_value = self._layers[index]
                key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
            # The next query sees itself and window - 1 tokens before it.
            keep = key.shape[2] if span.window is None else span.window - 1
            first = max(0, key.shape[2] - keep)
            self._layers[index] = key[:, :, first:], value[:, :, first:]
            return key, value

        return extend

    def masks(self, spans: Mapping[str, Span], positions: Tensor) -> dict[str, Tensor]:
        """Masks [B, 1, S, K + S] of new tokens at `positions` [B, S] against what each kind of layer still holds."""
        new = positions.shape[1]
        query = torch.arange(self.num_tokens, self.num_tokens + new, device=positions.device).view(-1, 1)
        masks = {}
        for kind, span in spans.items():
            held = self.num_tokens if span.window is None else min(self.num_tokens, span.window - 1)
            key = torch.arange(self.num_tokens - held, self.num_tokens + new, device=positions.device)
            keep = key <= query
            if span.window is not None:
                keep &= query - key < span.window
            masks[kind] = keep.expand(positions.shape[0], 1, *keep.shape)
        return masks
