"""The student: MobileLLM-Pro's decoder, three local attention layers to one global, embeddings that are the head too.

Parameter names are those of stock `transformers`' SmolLM3 without the prefix `model.`, so that export is a rename.
There is no output module: `forward` hands the last hidden states and the embedding matrix to the callable `head`,
inside the FSDP root, where that matrix is gathered already. Losses never see a logits tensor that they did not make.

Shapes: B rows, S tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model import rotary
from mobilellm_pro.model.attention import Attend
from mobilellm_pro.model.attention_mask import AttentionMask, PackedRows
from mobilellm_pro.model.initialization import init_normal
from mobilellm_pro.model.kv_cache import KVCache, LayerAttention
from mobilellm_pro.model.quantized_modules import StudentQuantization, begin_ranges
from mobilellm_pro.model.row_shard import Span
from mobilellm_pro.quantization.scheme import CacheDtype

Head = Callable[[Tensor, Tensor], Any]
"""(hidden [B, S, D], head weight [V, D]) -> whatever the caller wants from the model."""


@dataclass
class StudentArgs(BaseModelArgs):
    """Architecture; names follow Hugging Face's config.json."""

    vocab_size: int = 202_048
    hidden_size: int = 1280
    intermediate_size: int = 6144
    num_hidden_layers: int = 30
    num_attention_heads: int = 20
    num_key_value_heads: int = 4
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int = 512
    global_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 28, 29)
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        outside = [i for i in self.global_layers if not 0 <= i < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"attention.global_layers names layers {outside}; "
                f"the model has layers 0 to {self.num_hidden_layers - 1}"
            )

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Takes the phase's attention settings over the flavor's; torchtitan calls this before it builds the model."""
        self.__dict__.update(with_attention(self, job_config).__dict__)

    def kind(self, layer: int) -> str:
        """ "global" or "local"."""
        return "global" if layer in self.global_layers else "local"

    def spans(self) -> dict[str, Span]:
        """Kind of layer -> how far back it looks."""
        return {"global": Span(), "local": Span(window=self.sliding_window)}

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and training FLOPs a token: 6 a weight, 12·W·H a visible key, causal rows half visible.

        The shared matrix is counted once: the lookup multiplies nothing, the head does.
        """
        num_parameters = sum(p.numel() for p in model.parameters())
        attention = 0
        for layer in range(self.num_hidden_layers):
            keys = seq_len / 2 if self.kind(layer) == "global" else min(self.sliding_window, seq_len / 2)
            attention += int(12 * self.num_attention_heads * self.head_dim * keys)
        return num_parameters, 6 * num_parameters + attention


def with_attention(args: StudentArgs, config: JobConfig) -> StudentArgs:
    """The flavor's arguments with the phase's [attention] settings."""
    chosen = config.attention
    return replace(
        args,
        global_layers=args.global_layers if chosen.global_layers is None else tuple(chosen.global_layers),
        sliding_window=args.sliding_window if chosen.window is None else chosen.window,
        rope_theta=args.rope_theta if chosen.rope_base is None else chosen.rope_base,
    )


FLAVORS: Mapping[str, StudentArgs] = {
    "1b": StudentArgs(),
    "debug": StudentArgs(
        vocab_size=4096,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        sliding_window=64,
        global_layers=(0, 3),
    ),
    "100m": StudentArgs(  # 104M parameters with the vocabulary of the 1b
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        global_layers=(0, 4, 8, 11),
    ),
    "proxy": StudentArgs(  # for `mix`: the vocabulary of the 1b, 60M parameters
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        global_layers=(0, 4, 7),
    ),
}


class TiedEmbedding(nn.Embedding):
    """The table that ids are looked up in and that hidden states are multiplied by."""

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> what the head multiplies: hidden states [..., D] and weight [V, D]; after the lookup."""
        return hidden, self.weight


class SelfAttention(nn.Module):
    """Grouped-query attention with rotated halves; numbers of heads follow from the (sharded) projections' widths."""

    def __init__(self, args: StudentArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.q_proj = nn.Linear(args.hidden_size, args.num_attention_heads * args.head_dim, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, args.num_key_value_heads * args.head_dim, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, args.num_key_value_heads * args.head_dim, bias=False)
        self.o_proj = nn.Linear(args.num_attention_heads * args.head_dim, args.hidden_size, bias=False)
        self.attend = Attend()
        self.stored: Callable[[Tensor], Tensor] | None = None
        """Keys or values [B, G, S, W] as a cache of few bits will give them back; None: exactly."""

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask | None, cached: LayerAttention | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]; under the mask, or, with a cache, as the number of tokens in it says."""
        query = self._heads(self.q_proj(x))
        key = self._heads(self.k_proj(x))
        value = self._heads(self.v_proj(x))
        query, key = rotary.rotate_halves(query, rope), rotary.rotate_halves(key, rope)
        if cached is not None:
            out = cached(query, key, value)
        else:
            assert mask is not None
            if self.stored is not None:
                key, value = self.stored(key), self.stored(value)
            out = self.attend(query, key, value, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden_width, bias=False)
        self.up_proj = nn.Linear(width, hidden_width, bias=False)
        self.down_proj = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class StudentLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, args: StudentArgs):
        super().__init__()
        self.self_attn = SelfAttention(args)
        self.mlp = GatedMLP(args.hidden_size, args.intermediate_size)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask | None, cached: LayerAttention | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


class Student(ModelProtocol):
    """Decoder with tied embeddings."""

    def __init__(self, args: StudentArgs):
        super().__init__(args)
        self.model_args = args
        self.quantization: StudentQuantization | None = None
        """Set by `quantize_modules`: the model computes as it will with weights of few bits."""
        self.embed_tokens = TiedEmbedding(args.vocab_size, args.hidden_size)
        self.layers = nn.ModuleDict({str(i): StudentLayer(args) for i in range(args.num_hidden_layers)})
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draws the initial weights; the same on every layout."""
        init_normal(self.named_parameters(), self.model_args.initializer_range, self.model_args.num_hidden_layers)
        begin_ranges(self)

    def spans(self) -> dict[str, Span]:
        """Kind of layer -> how far back it looks."""
        return self.model_args.spans()

    @property
    def cache_dtype(self) -> CacheDtype:
        """Of the KV cache that it is trained for."""
        return "model" if self.quantization is None else self.quantization.scheme.cache

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        masks: Mapping[str, AttentionMask] | None = None,
        head: Head | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Runs the decoder.

        Args:
            tokens: [B, S] ids.
            positions: [B, S]; default 0, 1, ... or, with a cache, the positions after it.
            masks: kind -> mask (`PackedRows.masks`); default causal over the row; with a cache, always over both.
            head: what to do with (hidden [B, S, D], weight [V, D]); default the logits [B, S, V].
            cache: keys and values of earlier tokens, which this call extends.
        """
        args = self.model_args
        assert cache is None or masks is None, "a cache knows what its queries may see"
        if cache is not None and self.cache_dtype == "int8" != cache.dtype:
            raise ValueError(f'this student is trained for a cache in int8; got one of type "{cache.dtype}"')
        if positions is None:
            start = 0 if cache is None else cache.num_tokens
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if masks is None:
            masks = PackedRows(torch.zeros_like(tokens)).masks(self.spans(), "causal") if cache is None else {}
        hidden = self.embed_tokens(tokens)
        rope = rotary.half_tables(rotary.angles(positions, args.head_dim, args.rope_theta), hidden.dtype)
        for name, layer in self.layers.items():
            kind = args.kind(int(name))
            cached = None if cache is None else cache.layer(int(name), self.spans()[kind])
            hidden = layer(hidden, rope, masks.get(kind), cached)
        if cache is not None:
            cache.num_tokens += tokens.shape[1]
        return (head or F.linear)(*self.embed_tokens.head(self.norm(hidden)))
