"""The quantized student as a program for devices: int4 weights, int8 activations, an int8 KV cache in its own buffers.

In eager mode it is the reference that an exported program is compared with; `executorch_lowering` makes the program.
One method prefills, a chunk of tokens at a time, and decodes. Weights are the model's integers and bfloat16 scales;
nothing is rounded again.

One int4 table serves lookup and head. Both kernels read two integers from a byte, but in opposite orders, so the head
multiplies features with neighbours swapped by a table with neighbouring columns swapped: packed for the head's kernel,
that table has the bytes of the lookup's, and identical bytes are stored once.

Global layers keep `max_tokens` slots, local ones a ring of a window: token t lies in slot t % window, and a chunk,
which is no longer than the window, sees the ring as it was before it and itself. Keys and values are quantized as in
training (paper, Eq. 3, per token and head). ExecuTorch's own attention on int8 keys rounds queries too and took 3.5 to
10 times as long on x86 (1 and 512 queries, 8,192 keys), so attention is its fp32 kernel over dequantized slots.

Shapes: S new tokens, D width, V vocabulary, H query heads, G key/value heads, W head width, C slots, R rows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers the operators `quantized_decomposed`

from mobilellm_pro.convert.executorch_kernels import Stored, attend_from, attend_under, lookup, write_at, write_from
from mobilellm_pro.model import rotary
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight
from mobilellm_pro.quantization.token_quantizer import quantize_tokens

Weights = Mapping[str, QuantizedWeight]


class Int8Input(nn.Module):
    """Activations to the integers that XNNPACK's kernels multiply, per token, and back: the pattern that it knows."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        ops = torch.ops.quantized_decomposed
        scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        integers = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        return ops.dequantize_per_token(integers, scale, zero, -128, 127, torch.int8, torch.float32)


class Int4Linear(nn.Module):
    """A linear layer of given integers and scales; its input has been through `Int8Input`."""

    integers: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.group = weight.integers.shape[1] // weight.scales.shape[1]
        self.register_buffer("integers", weight.integers)
        # XNNPACK stores bfloat16, which is exact; in that type eager torch would round integer times scale.
        self.register_buffer("scales", weight.scales.float())
        self.register_buffer("zeros", torch.zeros(weight.scales.shape, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., R]."""
        weight = torch.ops.quantized_decomposed.dequantize_per_channel_group(
            self.integers, self.scales, self.zeros, -8, 7, torch.int8, self.group, torch.float32
        )
        return F.linear(x, weight)


class SharedTable(nn.Module):
    """Embedding and head in the same bytes."""

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        offset = (weight.integers + 8).view(torch.uint8)
        self.register_buffer("packed", offset[:, 0::2] << 4 | offset[:, 1::2])
        self.register_buffer("scales", weight.scales.contiguous())
        self.head = Int4Linear(QuantizedWeight(swap_neighbours(weight.integers), weight.scales))
        self.int8 = Int8Input()

    def embed(self, tokens: Tensor) -> Tensor:
        """[1, S] -> [1, S, D]."""
        return lookup(self.packed, self.scales, tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """[1, S, D] -> [1, S, V]."""
        return self.head(self.int8(swap_neighbours(hidden)))


def swap_neighbours(x: Tensor) -> Tensor:
    """Features 0 1 2 3 ... -> 1 0 3 2 ..., [..., D] -> [..., D]."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


class KVSlots(nn.Module):
    """Keys (first) and values (second) of a layer as they are stored: bytes, with two numbers a token and head."""

    payload: Tensor
    steps: Tensor
    lows: Tensor

    def __init__(self, num_slots: int, args: StudentArgs):
        super().__init__()
        heads = (2, num_slots, args.num_key_value_heads)
        self.register_buffer("payload", torch.zeros(*heads, args.head_dim, dtype=torch.uint8))
        self.register_buffer("steps", torch.zeros(*heads, 1))
        self.register_buffer("lows", torch.zeros(*heads, 1))

    @property
    def stored(self) -> Stored:
        """All of them."""
        return self.payload, self.steps, self.lows


class Ring(NamedTuple):
    """What S new tokens see of the C slots of a ring and of each other, and where they go.

    Attributes:
        mask: fp32 [S, C + S], 0 or -inf, slots first.
        indices: slots of the new tokens, for keys and for values, [2, S].
        filled: whether a slot holds a token yet, [1, C, 1, 1].
    """

    mask: Tensor
    indices: Tensor
    filled: Tensor

    @staticmethod
    def of(start: int, num_new: int, num_slots: int) -> "Ring":
        """Before tokens start, ..., start + num_new - 1."""
        new = torch.arange(num_new) + start
        # The newest token of a slot before the chunk; negative where there is none yet. ExecuTorch's remainder of a
        # negative number is negative, so a turn more.
        slots = start - 1 - torch.remainder(start + num_slots - 1 - torch.arange(num_slots), num_slots)
        stored = (slots >= 0) & (new.unsqueeze(1) - slots < num_slots)
        seen = torch.cat((stored, new.unsqueeze(1) >= new), dim=1)
        mask = torch.where(seen, 0.0, float("-inf"))
        return Ring(mask, torch.remainder(new, num_slots).expand(2, -1), (slots >= 0).view(1, num_slots, 1, 1))


class CachedAttention(nn.Module):
    """Quantizes and stores new keys and values, and attends to what is stored."""

    def __init__(self, args: StudentArgs, is_local: bool, max_tokens: int):
        super().__init__()
        self.is_local = is_local
        self.slots = KVSlots(ring_slots(args, max_tokens) if is_local else max_tokens, args)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, start: int, ring: Ring) -> Tensor:
        """[1, S, H, W] and twice [1, S, G, W] -> [1, S, H, W]."""
        new = quantize_tokens(torch.cat((key, value)))
        if self.is_local:
            keys, values = dequantize(seen_of(self.slots.stored, new, ring)).split(1)
            attended = attend_under(query, keys, values, ring.mask)
            write_at(self.slots.stored, new, ring.indices)
            return attended
        write_from(self.slots.stored, new, start)
        end = start + query.shape[1]
        torch._check(end <= self.slots.payload.shape[1])
        # A short sequence does not pay for the room that there is. Bytes are split, since floats are four times that.
        keys_and_values = zip(*(part.narrow(1, 0, end).split(1) for part in self.slots.stored))
        keys, values = (dequantize(stored) for stored in keys_and_values)
        return attend_from(query, keys, values, start)


def ring_slots(args: StudentArgs, max_tokens: int) -> int:
    """Slots of a local layer, and the longest chunk."""
    return min(args.sliding_window, max_tokens)


def dequantize(stored: Stored) -> Tensor:
    """uint8 [..., W] and ranges -> fp32, a rounding away from the definition, which is in fp64."""
    payload, steps, lows = stored
    return payload.float() * steps + lows


def seen_of(slots: Stored, new: Stored, ring: Ring) -> Stored:
    """A ring and new tokens behind it, C + S."""
    payload, steps, lows = slots
    # A device's memory begins with any bits, and NaN times a probability of 0 is NaN.
    clean = payload, torch.where(ring.filled, steps, 0.0), torch.where(ring.filled, lows, 0.0)
    payload, steps, lows = (torch.cat(pair, dim=1) for pair in zip(clean, new, strict=True))
    return payload, steps, lows


class DecoderLayer(nn.Module):
    """Pre-norm block of the student over quantized weights."""

    def __init__(self, args: StudentArgs, index: int, weights: Weights, norms: Mapping[str, Tensor], max_tokens: int):
        super().__init__()
        self.head_dim = args.head_dim
        prefix = f"layers.{index}"
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Int4Linear(weights[f"{prefix}.self_attn.{name}_proj.weight"]) for name in "qkvo"
        )
        self.gate_proj, self.up_proj, self.down_proj = (
            Int4Linear(weights[f"{prefix}.mlp.{name}_proj.weight"]) for name in ("gate", "up", "down")
        )
        self.input_layernorm = Norm(norms[f"{prefix}.input_layernorm.weight"], args.rms_norm_eps)
        self.post_attention_layernorm = Norm(norms[f"{prefix}.post_attention_layernorm.weight"], args.rms_norm_eps)
        self.attention = CachedAttention(args, args.kind(index) == "local", max_tokens)
        self.int8 = Int8Input()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], start: int, ring: Ring) -> Tensor:
        """[1, S, D] -> [1, S, D]."""
        normed = self.int8(self.input_layernorm(x))
        query, key, value = (self._heads(project(normed)) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotary.rotate_halves(query, rope), rotary.rotate_halves(key, rope)
        attended = self.attention(query, key, value, start, ring)
        x = x + self.o_proj(self.int8(attended.flatten(2)))
        normed = self.int8(self.post_attention_layernorm(x))
        return x + self.down_proj(self.int8(F.silu(self.gate_proj(normed)) * self.up_proj(normed)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class Norm(nn.Module):
    """RMSNorm in fp32; a weight [D] that fits into bfloat16, as training in that type leaves it, is stored so."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        short = weight.to(torch.bfloat16)
        self.register_buffer("weight", short if torch.equal(short.float(), weight.float()) else weight.float())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(x, self.weight.shape, self.weight.float(), self.eps)


class Decoder(nn.Module):
    """The exported method: token ids and where they begin -> logits of the last of them.

    Args:
        args: architecture.
        weights: of every linear layer and the table, by their names in `Student.state_dict()`.
        norms: weights of all norms, likewise.
        max_tokens: room for tokens, prompt and continuation together.
    """

    def __init__(self, args: StudentArgs, weights: Weights, norms: Mapping[str, Tensor], max_tokens: int):
        super().__init__()
        self.args, self.max_tokens = args, max_tokens
        self.chunk_tokens = ring_slots(args, max_tokens)
        self.table = SharedTable(weights["embed_tokens.weight"])
        self.layers = nn.ModuleList(
            DecoderLayer(args, i, weights, norms, max_tokens) for i in range(args.num_hidden_layers)
        )
        self.norm = Norm(norms["norm.weight"], args.rms_norm_eps)

    def forward(self, tokens: Tensor, start_position: Tensor) -> Tensor:
        """int64 [1, S] and [1] -> fp32 [1, V]; S at most `chunk_tokens` and start + S at most `max_tokens`."""
        return self.table.logits(self.hidden(tokens, start_position)[:, -1:]).squeeze(1)

    def hidden(self, tokens: Tensor, start_position: Tensor) -> Tensor:
        """What the head multiplies, of all new tokens: [1, S, D]."""
        start: Any = start_position.item()
        torch._check(start >= 0)
        torch._check(start < self.max_tokens)
        num_new = tokens.shape[1]
        positions = (torch.arange(num_new) + start).unsqueeze(0)
        tables = rotary.half_tables(rotary.angles(positions, self.args.head_dim, self.args.rope_theta), torch.float32)
        rope = (tables[0].transpose(1, 2), tables[1].transpose(1, 2))
        ring = Ring.of(start, num_new, self.chunk_tokens)
        x = self.table.embed(tokens)
        for layer in self.layers:
            x = layer(x, rope, start, ring)
        return self.norm(x)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots, ranges included."""
        caches = (module for module in self.modules() if isinstance(module, KVSlots))
        return sum(buffer.nbytes for cached in caches for buffer in cached.stored)
