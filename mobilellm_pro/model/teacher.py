"""The teacher: Llama 4's text decoder, exact against `transformers`' Llama4ForCausalLM.

Every fourth layer has no position embedding and full attention, with the query scaled by the logarithm of its
position; the others rotate interleaved pairs, normalise queries and keys without weights, and attend inside chunks.
Feed-forward layers route each token to one expert (`experts.py`).

Only the frozen teacher is ever split: with a `Split` each rank holds whole heads, columns of the feed-forward layers
and experts, and a layer sums what the ranks computed. It needs no gradients: plain tensors and two sums a layer do.

Parameter names and layouts are those of Hugging Face's checkpoints without the prefix `model.`: loading copies tensors
into shards and never reshapes one.

Shapes: B rows, S tokens, D width, W head width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model import rotary
from mobilellm_pro.model.attention import Attend
from mobilellm_pro.model.attention_mask import AttentionMask, PackedRows
from mobilellm_pro.model.experts import MoE
from mobilellm_pro.model.initialization import init_normal
from mobilellm_pro.model.rotary import FrequencyScaling
from mobilellm_pro.model.row_shard import Span
from mobilellm_pro.model.student import GatedMLP, Head


@dataclass
class TeacherArgs(BaseModelArgs):
    """Architecture of a Llama 4 text model; names follow Hugging Face's config.json, defaults are Scout's."""

    vocab_size: int = 202_048
    hidden_size: int = 5120
    intermediate_size: int = 8192
    intermediate_size_mlp: int = 16_384
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    num_local_experts: int = 16
    interleave_moe_layer_step: int = 1
    no_rope_layer_interval: int = 4
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: FrequencyScaling | None = FrequencyScaling(16.0, 1.0, 1.0, 8192)
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    attention_chunk_size: int = 8192
    max_position_embeddings: int = 10_485_760
    initializer_range: float = 0.02

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Nothing of a phase changes the teacher; torchtitan calls this before it builds the model."""

    def uses_rope(self, layer: int) -> bool:
        """Whether the layer has position embeddings (and chunked attention)."""
        return (layer + 1) % self.no_rope_layer_interval != 0

    def kind(self, layer: int) -> str:
        """ "chunked" or "full" attention."""
        return "chunked" if self.uses_rope(layer) else "full"

    def spans(self) -> dict[str, Span]:
        """Kind of layer -> how far back it looks."""
        return {"full": Span(), "chunked": Span(chunk=self.attention_chunk_size)}

    def is_moe(self, layer: int) -> bool:
        """Whether the layer routes to experts."""
        return (layer + 1) % self.interleave_moe_layer_step == 0

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and training FLOPs a token counting the one expert that a token visits."""
        total = active = 0
        for name, parameter in model.named_parameters():
            total += parameter.numel()
            if ".experts." in name:
                active += parameter.numel() // self.num_local_experts
            elif name != "embed_tokens.weight":
                active += parameter.numel()
        attention = 0
        for layer in range(self.num_hidden_layers):
            keys = min(self.attention_chunk_size, seq_len) / 2 if self.uses_rope(layer) else seq_len / 2
            attention += int(12 * self.num_attention_heads * self.head_dim * keys)
        return total, 6 * active + attention


FLAVORS: Mapping[str, TeacherArgs] = {
    "scout": TeacherArgs(),
    "debug": TeacherArgs(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        intermediate_size_mlp=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        floor_scale=128,
        attention_chunk_size=128,
        max_position_embeddings=131_072,
    ),
}


class Split(NamedTuple):
    """Into how many equal parts a layer is split over ranks; the model then holds one of them."""

    tensor: int = 1
    """Parts of the heads, the key/value heads and the feed-forward columns."""

    experts: int = 1
    """Parts of the experts."""


WHOLE = Split()


class TeacherAttention(nn.Module):
    """Attention of one layer: RoPE, weightless QK norm and chunks, or neither and temperature tuning."""

    def __init__(self, args: TeacherArgs, layer: int, split: Split = WHOLE):
        super().__init__()
        self.args = args
        self.use_rope = args.uses_rope(layer)
        query_width = args.num_attention_heads // split.tensor * args.head_dim
        key_width = args.num_key_value_heads // split.tensor * args.head_dim
        self.q_proj = nn.Linear(args.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, args.hidden_size, bias=False)
        self.attend = Attend()

    def forward(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.args.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.use_rope:
            query, key = rotary.rotate_pairs(query, rope), rotary.rotate_pairs(key, rope)
            if self.args.use_qk_norm:
                query, key = self._normalize(query), self._normalize(key)
        elif self.args.attn_temperature_tuning:
            query = (query * self._temperature(positions)).to(query.dtype)
        out = self.attend(query, key, value, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.args.rms_norm_eps).to(x.dtype)

    def _temperature(self, positions: Tensor) -> Tensor:
        """1 + scale · log(1 + floor((position + 1) / floor_scale)), [B, S] -> [B, 1, S, 1]."""
        scale = torch.log1p(torch.floor((positions.float() + 1.0) / self.args.floor_scale)) * self.args.attn_scale + 1.0
        return scale.unsqueeze(1).unsqueeze(-1)


class TeacherLayer(nn.Module):
    """Pre-norm block; the ranks of `tensor_group` hold the parts of one layer and the same tokens."""

    def __init__(self, args: TeacherArgs, layer: int, split: Split = WHOLE):
        super().__init__()
        self.self_attn = TeacherAttention(args, layer, split)
        self.feed_forward: nn.Module
        if args.is_moe(layer):
            num_experts, inner = args.num_local_experts, args.intermediate_size // split.tensor
            self.feed_forward = MoE(args.hidden_size, inner, num_experts, num_experts // split.experts)
        else:
            self.feed_forward = GatedMLP(args.hidden_size, args.intermediate_size_mlp // split.tensor)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.tensor_group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self._sum(self.self_attn(self.input_layernorm(x), positions, rope, mask))
        return x + self._sum(self.feed_forward(self.post_attention_layernorm(x)))

    def _sum(self, part: Tensor) -> Tensor:
        if self.tensor_group is not None:
            dist.all_reduce(part, group=self.tensor_group)
        return part


class Teacher(ModelProtocol):
    """Llama 4 text decoder with its own output head.

    Args:
        args: architecture of the whole model.
        split: what of it this rank holds; the groups of ranks are set by `teacher_sharding.connect`.
    """

    def __init__(self, args: TeacherArgs, split: Split = WHOLE):
        super().__init__(args)
        self.model_args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = nn.ModuleDict({str(i): TeacherLayer(args, i, split) for i in range(args.num_hidden_layers)})
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draws the initial weights; the same on every layout."""
        init_normal(self.named_parameters(), self.model_args.initializer_range, self.model_args.num_hidden_layers)

    def spans(self) -> dict[str, Span]:
        """Kind of layer -> how far back it looks."""
        return self.model_args.spans()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        masks: Mapping[str, AttentionMask] | None = None,
        head: Head | None = None,
    ) -> Any:
        """Runs the decoder.

        Args:
            tokens: [B, S] ids.
            positions: [B, S]; default 0, 1, ...
            masks: kind -> mask (`PackedRows.masks`); default causal over the row, chunks cut by place in the row.
            head: what to do with (hidden [B, S, D], weight [V, D]); default the logits [B, S, V].
        """
        args = self.model_args
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if masks is None:
            masks = PackedRows(torch.zeros_like(tokens)).masks(self.spans(), "causal")
        hidden = self.embed_tokens(tokens)
        rope = rotary.pair_tables(rotary.angles(positions, args.head_dim, args.rope_theta, args.rope_scaling))
        for name, layer in self.layers.items():
            hidden = layer(hidden, positions, rope, masks[args.kind(int(name))])
        hidden = self.norm(hidden)
        return (head or F.linear)(hidden, self.lm_head.weight)
