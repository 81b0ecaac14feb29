"""What one rank computes and moves in one step: floating-point operations of all products, bytes by kind of collective.

A product of [N, A] and [A, B] is 2 N A B operations; element-wise work is not counted. A linear layer costs that
forward and twice that backward. Attention over k visible keys costs 4 Q k a token forward (scores, values) and 10 Q k
backward, where its kernels compute the scores once more (five products for two). What checkpointing computes again is
work of its own, so that the total is what the device does, not the model's share of it. `tests/pipeline` compares all
this with torch's counter.

Bytes are those that arrive at a rank. For n ranks and a whole tensor of M bytes, an all-gather or reduce-scatter brings
M (n - 1) / n, an all-reduce twice that, an all-to-all of M bytes a rank M (n - 1) / n. Not counted: scalars, statistics
of a split vocabulary (8 numbers a token), checkpoints, tokens from disk.

Letters as in `step_memory.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mobilellm_pro.config import JobConfig
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.pipeline.peak_memory import StudentStep
from mobilellm_pro.pipeline.step_memory import TeacherStep
from mobilellm_pro.pipeline.step_shape import StepShape

BACKWARD_ATTENTION = 2.5
"""Products of attention backward, over those forward."""


@dataclass(frozen=True)
class Transfer:
    """Bytes of one kind of collective that arrive at a rank in a step."""

    kind: str
    num_bytes: float
    members: Sequence[int]
    """Ranks of one group, that of rank 0: which of them are on one node decides how fast they are."""

    hidden_behind: str = ""
    """ "student" or "teacher": whose products it runs beside; "" for none."""

    @property
    def ranks(self) -> int:
        """Of one group."""
        return len(self.members)


def student_flops(
    config: JobConfig, args: StudentArgs, shape: StepShape, *, everywhere: bool = False
) -> dict[str, float]:
    """Operations of the student's layers on one rank in a step: forward, backward, recomputed.

    Args:
        everywhere: of the average rank instead of the busiest.
    """
    width, query = args.hidden_size, args.num_attention_heads * args.head_dim
    linear = 2 * (2 * width * query + 2 * width * args.num_key_value_heads * args.head_dim)
    linear += 2 * 3 * width * args.intermediate_size
    mask = config.attention.student_mask
    keys = {kind: shape.mean_keys(span, mask, everywhere=everywhere) for kind, span in args.spans().items()}
    attention = 4 * query * sum(keys[args.kind(layer)] for layer in range(args.num_hidden_layers))
    forward = linear * args.num_hidden_layers
    tokens = shape.tokens * shape.micro_batches / shape.tensor
    share, attention_share = _recomputed(args, shape)
    return {
        "forward": tokens * (forward + attention),
        "backward": tokens * (2 * forward + BACKWARD_ATTENTION * attention),
        "recomputed": tokens * (share * forward + attention_share * attention),
    }


def _recomputed(args: StudentArgs, shape: StepShape) -> tuple[float, float]:
    """Shares of the linear layers' and of attention's forward work that checkpointing does again.

    "op" keeps q, v, gate and down and computes k, o and up again; attention's result is kept on an accelerator.
    """
    mode = shape.checkpointing
    if mode == "none":
        return 0.0, 0.0
    if mode.isdigit():
        share = args.num_hidden_layers // int(mode) / args.num_hidden_layers
        return share, share
    if mode == "op":
        query, key = args.num_attention_heads * args.head_dim, args.num_key_value_heads * args.head_dim
        again = key + query + args.intermediate_size
        return again / (2 * query + 2 * key + 3 * args.intermediate_size), float(shape.device == "cpu")
    return 1.0, 1.0


def teacher_flops(config: JobConfig, teacher: TeacherStep, shape: StepShape, *, everywhere: bool = False) -> float:
    """Operations of the teacher's layers on one rank in a step; with balanced experts, and none from a cache."""
    if teacher.cached:
        return 0.0
    args, split = teacher.args, teacher.layout.split
    width, query = args.hidden_size, args.num_attention_heads * args.head_dim
    attention_linear = 2 * (2 * width * query + 2 * width * args.num_key_value_heads * args.head_dim)
    routed = 2 * (2 * 3 * width * args.intermediate_size)
    dense = 2 * 3 * width * args.intermediate_size_mlp
    mask = config.attention.teacher_mask
    keys = {kind: shape.mean_keys(span, mask, everywhere=everywhere) for kind, span in args.spans().items()}
    split_work = whole_work = 0.0
    for layer in range(args.num_hidden_layers):
        split_work += attention_linear + 4 * query * keys[args.kind(layer)]
        split_work += routed if args.is_moe(layer) else dense
        whole_work += 2 * width * args.num_local_experts if args.is_moe(layer) else 0  # the router is not split
    return teacher.tokens(shape) * shape.micro_batches * (split_work / split.tensor + whole_work)


def loss_flops(
    config: JobConfig, args: StudentArgs, teacher_width: int | None, teacher_bytes: int, shape: StepShape
) -> dict[str, float]:
    """Operations of the loss on one rank in a step, for either head.

    The student's logits and the gradients of its hidden states and head, 6 V D a token, and the teacher's logits, 2 V
    E. bf16 logits good to fp32 take one product more each on a CPU.
    """
    rows = args.vocab_size / shape.tensor * shape.tokens * shape.micro_batches
    again = config.distill.fp32_logits and shape.device == "cpu"
    student = 6 + 2 * (again and shape.compute_bytes == 2)
    teacher = 2 + 2 * (again and teacher_bytes == 2)
    return {"student head": student * rows * args.hidden_size, "teacher head": teacher * rows * (teacher_width or 0)}


def transfers(student: StudentStep, teacher: TeacherStep | None, shape: StepShape) -> list[Transfer]:
    """Bytes that arrive at a rank in a step, by kind; kinds that do not occur are left out."""
    found = [*_student_weights(student, shape), *_student_activations(student.args, shape)]
    if teacher is not None:
        found += [*_teacher_weights(teacher, shape), *_teacher_activations(teacher, shape)]
    return [transfer for transfer in found if transfer.ranks > 1 and transfer.num_bytes > 0]


def _student_weights(student: StudentStep, shape: StepShape) -> Iterator[Transfer]:
    """Layers are gathered forward and backward, the root once; gradients are summed after every micro-batch."""
    gathered = sum(unit.gathered_numel * (2 if unit.name else 1) for unit in student.shards.units)
    numel, others = sum(unit.gathered_numel for unit in student.shards.units), _others(shape.shard)
    times, together = shape.micro_batches, _neighbours(shape.shard, shape.tensor)
    weights = gathered * shape.compute_bytes * others * times
    yield Transfer("student weights, all-gather", weights, together, "student")
    gradients = numel * shape.reduce_bytes * others * times
    yield Transfer("student gradients, reduce-scatter", gradients, together, "student")
    replicas = 2 * numel / max(1, shape.shard) * shape.reduce_bytes * _others(shape.replicate) * times
    kind = "student gradients, all-reduce of replicas"
    yield Transfer(kind, replicas, _neighbours(shape.replicate, shape.shard * shape.tensor), "student")


def _student_activations(args: StudentArgs, shape: StepShape) -> Iterator[Transfer]:
    """Of every layer, forward, backward and where it is recomputed.

    Context parallelism brings the keys and values that a kind of layer looks back on, and backward the gradients of
    those that were sent. Tensor parallelism gathers the stream before attention and before the feed-forward layer and
    scatters sums after them; backward it is the other way round. Outside the layers it sums the lookup, gathers the
    last hidden states and sums their gradients.
    """
    share, _ = _recomputed(args, shape)
    passes = 2 + (1 if shape.checkpointing == "op" else share)
    layers, tokens = args.num_hidden_layers, shape.tokens * shape.micro_batches
    key = args.num_key_value_heads * args.head_dim // shape.tensor
    exchanged = {kind: shape.exchanged_keys(span) for kind, span in args.spans().items()}
    exchanges = [exchanged[args.kind(layer)] for layer in range(layers)]
    keys = sum((passes - 1) * received + sent for received, sent in exchanges)
    keys *= 2 * key * shape.compute_bytes * shape.rows * shape.micro_batches
    yield Transfer("student keys and values, context parallel", keys, _neighbours(shape.context, shape.tensor))
    stream = tokens * args.hidden_size * shape.compute_bytes * _others(shape.tensor)
    yield Transfer(
        "student stream, tensor parallel", (4 * passes * layers + 2 + 4) * stream, _neighbours(shape.tensor, 1)
    )


def _teacher_weights(teacher: TeacherStep, shape: StepShape) -> Iterator[Transfer]:
    """Every unit once a micro-batch; resident weights were gathered long before.

    Experts that are split have fewer holders than the rest, and groups of their own.
    """
    if teacher.resident:
        return
    layout = teacher.layout
    shared, experts = layout.shard_groups()[0], layout.expert_shard_groups()[0]
    for ranks in sorted({unit.shard_degree for unit in teacher.shards.units} - {1}):
        members = shared if ranks == len(shared) else experts
        assert ranks == len(members), f"units of {ranks} ranks in {layout}"
        numel = sum(unit.gathered_numel for unit in teacher.shards.units if unit.shard_degree == ranks)
        weights = numel * teacher.element_bytes * _others(ranks) * shape.micro_batches
        yield Transfer("teacher weights, all-gather", weights, members, "teacher")


def _teacher_activations(teacher: TeacherStep, shape: StepShape) -> Iterator[Transfer]:
    """Two sums a layer, tokens to their experts and back, keys and values of the row, rows to and from other ranks."""
    if teacher.cached:
        return
    args, layout = teacher.args, teacher.layout
    layers, tokens = args.num_hidden_layers, teacher.tokens(shape) * shape.micro_batches
    stream = tokens * args.hidden_size * teacher.element_bytes
    sums = 2 * 2 * layers * stream * _others(layout.tensor)
    yield Transfer("teacher stream, tensor parallel", sums, layout.tensor_groups()[0])
    routed = 2 * sum(map(args.is_moe, range(layers))) * stream * _others(layout.expert)
    yield Transfer("teacher tokens, all-to-all to experts", routed, layout.expert_groups()[0])
    key = args.num_key_value_heads * args.head_dim // layout.tensor
    received = {kind: shape.exchanged_keys(span)[0] for kind, span in args.spans().items()}
    keys = sum(received[args.kind(layer)] for layer in range(layers))
    keys *= 2 * key * teacher.element_bytes * teacher.rows(shape) * shape.micro_batches
    yield Transfer("teacher keys and values, context parallel", keys, layout.context_groups()[0])
    together = layout.gather_groups()[0]
    ids = 8 * (tokens + tokens * shape.context) * _others(len(together))
    yield Transfer("token ids and documents", ids, together)
    apart = layout.spread_groups()[0]
    hidden = stream * len(apart) * _others(len(apart))
    yield Transfer("teacher hidden states, to ranks of equal rows", hidden, apart)


def _neighbours(ranks: int, stride: int) -> Sequence[int]:
    """Ranks of an axis of the student's mesh, which is a grid."""
    return range(0, ranks * stride, stride)


def _others(ranks: int) -> float:
    """Share of a whole tensor that arrives from other ranks."""
    return (ranks - 1) / ranks
