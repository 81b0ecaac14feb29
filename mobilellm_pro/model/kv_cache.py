"""Keys and values of earlier tokens, for generation: everything in global layers, the last window in local ones.

A local layer keeps a ring: token t lies in slot t % window and is overwritten by token t + window. What a query may see
follows from the number of tokens so far, so no mask over the whole sequence is ever made, and a long prompt may come in
chunks. With int8 every key and value goes through the cache's precision before any query sees it: the result is that of
the device, and it does not depend on the chunks.

Shapes: B rows, H query heads, G key/value heads, S new tokens, K keys, C slots, W head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mobilellm_pro.model.attention import attend_to_cache
from mobilellm_pro.model.row_shard import Span
from mobilellm_pro.quantization.scheme import CacheDtype
from mobilellm_pro.quantization.token_quantizer import dequantize_tokens, quantize_tokens

LayerAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries [B, H, S, W], new keys, new values [B, G, S, W]) -> [B, H, S, W]; stores the keys and values."""


class KVCache:
    """Cache of one batch of sequences of equal length; a layer's memory is taken when it first stores something.

    Attributes:
        capacity_tokens: tokens of a row that there is room for.
        num_tokens: tokens of a row so far; the model counts them on after each call.
    """

    def __init__(self, capacity_tokens: int, dtype: CacheDtype = "model") -> None:
        """Makes an empty cache.

        Args:
            capacity_tokens: longest row, prompt and continuation together; a local layer has room for a window at most.
            dtype: "model" or "int8".

        Raises:
            ValueError: no room, or an unknown type.
        """
        if capacity_tokens < 1:
            raise ValueError(f"a KV cache of {capacity_tokens} tokens; expected at least 1")
        if dtype not in ("model", "int8"):
            raise ValueError(f'a KV cache of type {dtype!r}; expected "model" or "int8"')
        self.capacity_tokens, self.dtype = capacity_tokens, dtype
        self.num_tokens = 0
        self._layers: dict[int, tuple[Slots, Slots]] = {}

    def layer(self, index: int, span: Span) -> LayerAttention:
        """The attention of layer `index`: over what it has stored, and over the new tokens, which it stores.

        Raises:
            ValueError: (the function) more tokens than the capacity.
        """
        assert span.chunk is None, "only the student has a cache, and it has no chunked layers"
        room = self.capacity_tokens if span.window is None else min(self.capacity_tokens, span.window)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            end = self.num_tokens + key.shape[2]
            if end > self.capacity_tokens:
                raise ValueError(f"{end} tokens for a KV cache of {self.capacity_tokens}; make it with more room")
            if index not in self._layers:
                self._layers[index] = Slots(room, key, self.dtype), Slots(room, value, self.dtype)
            keys, values = (
                slots.extend(new, self.num_tokens) for slots, new in zip(self._layers[index], (key, value), strict=True)
            )
            return attend_to_cache(query, keys, values, span.window)

        return attend

    @property
    def payload_bytes(self) -> int:
        """Bytes of the slots for keys and values in all layers that have stored something; ranges are not in it."""
        return sum(slots.payload_bytes for pair in self._layers.values() for slots in pair)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the ranges of an int8 cache: 8 for K and 8 for V, a token, head and layer; 0 for other types."""
        return sum(slots.scale_bytes for pair in self._layers.values() for slots in pair)


class Slots:
    """Keys, or values, of one layer: token t lies in slot t % C."""

    def __init__(self, num_slots: int, like: Tensor, dtype: CacheDtype) -> None:
        """Takes the memory of `num_slots` tokens [B, G, C, W] for tensors such as `like` [B, G, S, W]."""
        rows, heads, _, width = like.shape
        self.num_slots, self.int8, self.type = num_slots, dtype == "int8", like.dtype
        shapes = [((rows, heads, num_slots, width), torch.uint8 if self.int8 else like.dtype)]
        if self.int8:
            shapes += [((rows, heads, num_slots, 1), torch.float32)] * 2
        self._buffers = [torch.zeros(shape, dtype=kind, device=like.device) for shape, kind in shapes]

    def extend(self, new: Tensor, num_before: int) -> Tensor:
        """Stores tokens `num_before`, ... and gives what they may see, as it was stored.

        Args:
            new: [B, G, S, W].
            num_before: tokens stored before.

        Returns:
            [B, G, K, W], the tokens in order; for a single new one, which sees them all, in the order of their slots.
        """
        count, end = new.shape[2], num_before + new.shape[2]
        packed = quantize_tokens(new) if self.int8 else (new,)
        if count == 1 or end <= self.num_slots:
            self._put(packed, torch.arange(num_before, end, device=new.device) % self.num_slots)
            return self._unpack([buffer[:, :, : min(end, self.num_slots)] for buffer in self._buffers])
        # The first new query sees C - 1 earlier tokens, some of which the new ones are about to overwrite.
        earlier = torch.arange(max(0, num_before - self.num_slots + 1), num_before, device=new.device) % self.num_slots
        seen = [torch.cat((buffer[:, :, earlier], part), 2) for buffer, part in zip(self._buffers, packed, strict=True)]
        last = [part[:, :, -self.num_slots :] for part in packed]
        self._put(last, torch.arange(max(num_before, end - self.num_slots), end, device=new.device) % self.num_slots)
        return self._unpack(seen)

    def _put(self, packed: tuple[Tensor, ...] | list[Tensor], slots: Tensor) -> None:
        for buffer, part in zip(self._buffers, packed, strict=True):
            buffer[:, :, slots] = part

    def _unpack(self, packed: list[Tensor]) -> Tensor:
        return dequantize_tokens(packed[0], packed[1], packed[2], self.type) if self.int8 else packed[0]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the numbers themselves."""
        return self._buffers[0].nbytes

    @property
    def scale_bytes(self) -> int:
        """Bytes of the ranges."""
        return sum(buffer.nbytes for buffer in self._buffers[1:])
