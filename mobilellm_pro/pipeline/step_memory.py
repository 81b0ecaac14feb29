"""Memory of one rank in one step, from sizes that were read from the built models and formulas for what comes and goes.

Parameters, optimizer state, gradients and the teacher's shard are exact. Activations are the tensors that autograd
keeps, counted operation by operation; `tests/pipeline` compares them with what is kept, and the peak with what is
allocated and resident. A peak is the largest of a few moments, each a sum of named parts: what lives only at different
moments is not added up.

The loss is in `loss_memory.py`. Not covered, and left to a stated allowance: the allocator's fragmentation, NCCL's
buffers, the CUDA context and kernels' workspaces; nor the copy of the student that a needle test gathers between steps.
Compiled layers keep less than counted here: the partitioner recomputes element-wise results.

In comments: N tokens of a micro-batch on this rank, D width, Q and K width of all queries and of all keys, F
feed-forward width, each the part of this rank under tensor parallelism; L layers, V vocabulary, E teacher width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mobilellm_pro.model.attention_mask import BLOCK
from mobilellm_pro.model.row_shard import Span
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.model.teacher import Split, TeacherArgs
from mobilellm_pro.model.teacher_layout import TeacherLayout
from mobilellm_pro.pipeline.step_shape import StepShape
from mobilellm_pro.training.fake_ranks import ModelShards, Unit

GATHERED_AT_ONCE = 3
"""Copies of a unit that FSDP2 holds while one runs: its weights, the buffer they came in, the next one's buffer."""


@dataclass(frozen=True)
class TeacherStep:
    """The frozen teacher's part of a step."""

    args: TeacherArgs
    layout: TeacherLayout
    shards: ModelShards
    element_bytes: int
    cached: bool
    """Hidden states come from a cache, and only the head is there."""

    quantized: bool
    """Matrices of the layers are held in one byte an element, with a scale in fp32 for each output channel."""

    resident: bool
    overlap: bool
    """It runs for the next micro-batch beside the student's backward pass."""

    @property
    def held_bytes(self) -> int:
        """Bytes of the shard, or of the whole where nobody shares it."""
        num_bytes = self.shards.local_numel * self.element_bytes
        if self.cached or not self.quantized:
            return num_bytes
        args, layers = self.args, range(self.args.num_hidden_layers)
        kept = (2 * args.vocab_size + 1 + 2 * len(layers)) * args.hidden_size
        kept += sum(map(args.is_moe, layers)) * args.num_local_experts * args.hidden_size
        scales = sum(_output_channels(args, self.layout.split, layer) for layer in layers)
        return num_bytes - (self.shards.local_numel - kept) * (self.element_bytes - 1) + 4 * scales

    def rows(self, shape: StepShape) -> int:
        """Rows that this rank's tensor group runs: those of all its students, or a share of one's."""
        if self.layout.tensor >= shape.tensor:
            return shape.rows * self.layout.tensor // shape.tensor
        return -(-shape.rows * self.layout.tensor // shape.tensor)

    def tokens(self, shape: StepShape) -> int:
        """Tokens of those rows on this rank."""
        return self.rows(shape) * shape.part_tokens


def _output_channels(args: TeacherArgs, split: Split, layer: int) -> int:
    """Of all matrices of a layer that are quantized, those of this rank."""
    projections = (args.num_attention_heads + 2 * args.num_key_value_heads) * args.head_dim // split.tensor
    inner = args.intermediate_size if args.is_moe(layer) else args.intermediate_size_mlp
    blocks = 1 + args.num_local_experts // split.experts * args.is_moe(layer)  # a shared expert beside the others
    return projections + args.hidden_size + blocks * (2 * inner // split.tensor + args.hidden_size)


def layer_activations(args: StudentArgs, shape: StepShape, kind: str) -> int:
    """Bytes that autograd keeps of one student layer of a kind without checkpointing.

    Two norms keep their input and a scale (on a CPU, which computes them in fp32 step by step, two fp32 tensors); the
    products keep their inputs: two norms' outputs [N, D], attention's output [N, Q], and the product of the gate [N,
    F]; attention keeps queries, the keys and values that it looked back on, its output and a scale a head; the gate
    keeps both factors and its input, three of [N, F]. SDPA on a CPU also keeps a dense mask of each layer, in the
    queries' type.
    """
    width, heads = args.hidden_size, args.num_attention_heads // shape.tensor
    query, key = heads * args.head_dim, args.num_key_value_heads * args.head_dim // shape.tensor
    inner = args.intermediate_size // shape.tensor
    elements = 2 * width + 2 * query + 4 * inner
    per_token = elements * shape.compute_bytes + 4 * heads + 2 * _norm_bytes(args, shape) // shape.tensor
    num_keys = shape.num_keys(args.spans()[kind])
    keys = 2 * key * shape.rows * num_keys * shape.compute_bytes
    masks = shape.tokens * num_keys * shape.compute_bytes if shape.masks_densely(num_keys) else 0
    return shape.tokens * per_token + keys + masks


def _of_all_layers(args: StudentArgs, shape: StepShape) -> int:
    by_kind = {kind: layer_activations(args, shape, kind) for kind in args.spans()}
    return sum(by_kind[args.kind(layer)] for layer in range(args.num_hidden_layers))


def _norm_bytes(args: StudentArgs, shape: StepShape) -> int:
    return 4 + args.hidden_size * (8 if shape.device == "cpu" else shape.residual_bytes)


def saved_activations(args: StudentArgs, shape: StepShape, checkpointing: str | None = None) -> int:
    """Bytes that autograd keeps of the student between forward and backward, the loss' own apart.

    A checkpointed layer keeps its input [N, D]. With "op" it also keeps every second product in the order in which they
    run (of q, k, v, o, gate, up, down: q, v, gate and down), on an accelerator attention's output with its scale, and
    under tensor parallelism what was summed over ranks. Outside the layers: ids, the last norm, and two tables of the
    rotation.

    Args:
        checkpointing: as `StepShape.checkpointing`, which is the default.
    """
    mode = shape.checkpointing if checkpointing is None else checkpointing
    layers, width = args.num_hidden_layers, args.hidden_size
    whole, entry = _of_all_layers(args, shape), shape.tokens * width * shape.residual_bytes // shape.tensor
    outside = 8 + _norm_bytes(args, shape) // shape.tensor + 2 * args.head_dim * shape.compute_bytes
    kept = whole
    if mode == "full":
        kept = layers * entry
    elif mode == "op":
        kept = layers * (entry + shape.tokens * _kept_by_operation(args, shape))
    elif mode.isdigit():
        kept = layers // int(mode) * entry + (layers - layers // int(mode)) * whole // layers
    elif mode != "none":
        raise ValueError(f"activation_checkpoint.mode = {mode!r}: what the compiler keeps under it cannot be planned")
    return kept + shape.tokens * outside


def _kept_by_operation(args: StudentArgs, shape: StepShape) -> int:
    query = args.num_attention_heads * args.head_dim // shape.tensor
    key = args.num_key_value_heads * args.head_dim // shape.tensor
    elements = query + key + args.intermediate_size // shape.tensor + args.hidden_size
    if shape.tensor > 1:
        elements += 2 * args.hidden_size // shape.tensor
    if shape.device == "cpu":
        return elements * shape.compute_bytes
    return (elements + query) * shape.compute_bytes + 4 * args.num_attention_heads // shape.tensor


def layer_backward(args: StudentArgs, shape: StepShape) -> int:
    """Bytes of one layer while it runs backward: what it recomputes, and gradients of intermediate results.

    The most at a time are the gradients of both factors of the gate beside that of their product, [N, F] each, with the
    gradients of the stream; the product itself is gone by then. Under context parallelism keys and values arrive and
    are put in order, which holds them twice.
    """
    inner = args.intermediate_size // shape.tensor
    key = args.num_key_value_heads * args.head_dim // shape.tensor
    extra = shape.tokens * (2 * inner + 2 * args.hidden_size)
    extra += 2 * key * shape.rows * shape.num_keys(Span()) * (shape.context > 1)
    kept = saved_activations(args, shape) // args.num_hidden_layers
    recomputed = max(0, layer_activations(args, shape, "global") - kept)
    return recomputed + extra * shape.compute_bytes


def teacher_activations(teacher: TeacherStep, shape: StepShape) -> int:
    """Bytes of the teacher's layer while it runs; nothing is kept after it.

    In the feed-forward layer: the layer's input and its sum with attention, the norm, the scaled tokens and these in
    the order of their experts, [N, D] each, gate and up side by side, silu(gate) and the product, 4 [N, F]. Tokens that
    travel to their experts add their arrival and its order. In attention: input, norm, queries and output, and
    keys and values, under context parallelism also those of the row before, twice.
    """
    args, split = teacher.args, teacher.layout.split
    width, query = args.hidden_size, args.num_attention_heads * args.head_dim // split.tensor
    key = args.num_key_value_heads * args.head_dim // split.tensor
    routed = (7 if split.experts > 1 else 5) * width + 4 * args.intermediate_size // split.tensor
    dense = 3 * width + 3 * args.intermediate_size_mlp // split.tensor
    kinds = {args.is_moe(layer) for layer in range(args.num_hidden_layers)}
    attention = 2 * width + 2 * query + 2 * key
    most = max(attention, *(routed if is_moe else dense for is_moe in kinds)) * teacher.tokens(shape)
    if shape.context > 1:
        together = 2 * 2 * key * teacher.rows(shape) * shape.num_keys(Span())
        most = max(most, attention * teacher.tokens(shape) + together)
    return most * teacher.element_bytes


def restored_bytes(teacher: TeacherStep) -> int:
    """The largest matrix of a layer, while it is restored from FP8: gate and up of the rank's experts, if it has any.

    It is made in fp32 without and with its scales, and then rounded; compiled layers do without these copies.
    """
    if teacher.cached or not teacher.quantized:
        return 0
    args, split = teacher.args, teacher.layout.split
    experts = 2 * args.intermediate_size * (args.num_local_experts // split.experts)
    widths = {experts if args.is_moe(i) else args.intermediate_size_mlp for i in range(args.num_hidden_layers)}
    rounded = teacher.element_bytes if teacher.element_bytes < 4 else 0
    return args.hidden_size * max(*widths, args.num_attention_heads * args.head_dim) // split.tensor * (8 + rounded)


def mask_bytes(spans: Iterable[Span], shape: StepShape, rows: int) -> int:
    """Of several kinds of layers: two numbers a query, four tables of block numbers or, on a CPU, a dense mask."""
    total = 0
    for num_keys in map(shape.num_keys, spans):
        total += 2 * 4 * shape.part_tokens
        if shape.device == "cuda":
            total += 4 * 4 * -(-shape.part_tokens // BLOCK) * -(-num_keys // BLOCK)
        elif shape.masks_densely(num_keys):
            total += shape.part_tokens * num_keys
    return rows * total


def gathered_bytes(units: list[Unit], element_bytes: int) -> tuple[int, int]:
    """A unit while FSDP2 runs it and gathers the next: (three copies, one more while it arrives).

    Only what is not split along dim 0 is copied once more, before the unit runs.
    """
    sharded = [unit for unit in units if unit.shard_degree > 1]
    copies = GATHERED_AT_ONCE * sum(unit.gathered_numel for unit in sharded)
    return copies * element_bytes, sum(unit.copied_numel for unit in sharded) * element_bytes
