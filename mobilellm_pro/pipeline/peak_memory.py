"""The most memory that a rank holds in a step: its parts, the moments that could be the peak, and the largest of them.

A moment is a sum over what lives then. They follow the trainer: the teacher runs (or has run, beside the backward
pass), the student runs forward, the loss makes its gradients, the last layer runs backward, the embedding's two
gradients are added and summed over ranks, the optimizer steps.
"""

from dataclasses import dataclass

from mobilellm_pro.config import JobConfig
from mobilellm_pro.model.row_shard import Span
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.pipeline.loss_memory import LossWorkspace, loss_workspace
from mobilellm_pro.pipeline.step_memory import (
    TeacherStep,
    gathered_bytes,
    layer_activations,
    layer_backward,
    mask_bytes,
    restored_bytes,
    saved_activations,
    teacher_activations,
)
from mobilellm_pro.pipeline.step_shape import StepShape
from mobilellm_pro.training.fake_ranks import ModelShards

BATCH_BYTES = 8 * 5
"""Of a token: ids, labels, document, position and corpus in int64."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    held: dict[str, int]
    """Parameters, optimizer state and the teacher's shard all the time; gradients from backward to optimizer."""

    at_work: dict[str, int]
    """What comes and goes in a step; not all of it at one time."""

    activations: dict[str, int]
    """Of the student, kept from forward to backward, for each kind of checkpointing."""

    moments: dict[str, int]

    @property
    def peak(self) -> int:
        """The largest moment."""
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        """Its name."""
        return max(self.moments, key=lambda name: self.moments[name])


@dataclass(frozen=True)
class StudentStep:
    """The student's part of a step."""

    args: StudentArgs
    shards: ModelShards


def rank_memory(config: JobConfig, student: StudentStep, teacher: TeacherStep | None, shape: StepShape) -> RankMemory:
    """Memory of the rank that `shape` describes.

    Raises:
        ValueError: a loss or a kind of checkpointing that cannot be planned.
    """
    loss = loss_workspace(
        config,
        student.args,
        None if teacher is None else teacher.args.hidden_size,
        shape,
        0 if teacher is None else teacher.element_bytes,
    )
    held = _held(config, student, teacher, shape)
    work = _at_work(student, teacher, shape, loss)
    modes = dict.fromkeys(("none", "op", "full", shape.checkpointing))
    activations = {mode: saved_activations(student.args, shape, mode) for mode in modes}
    return RankMemory(held, work, activations, _moments(student, shape, loss, held, work, config))


def _held(config: JobConfig, student: StudentStep, teacher: TeacherStep | None, shape: StepShape) -> dict[str, int]:
    local, element = student.shards.local_numel, shape.parameter_bytes
    return {
        "parameters": local * element,
        # Two moments, and a step counter in fp32 for every parameter.
        "optimizer state": 2 * local * element + 4 * student.shards.num_tensors,
        "gradients": local * element,
        "teacher": 0 if teacher is None else teacher.held_bytes,
        "teacher, gathered for good": 0 if teacher is None else _resident_bytes(teacher),
    }


def _resident_bytes(teacher: TeacherStep) -> int:
    sharded = sum(unit.gathered_numel for unit in teacher.shards.units if unit.shard_degree > 1)
    return sharded * teacher.element_bytes if teacher.resident else 0


def _at_work(
    student: StudentStep, teacher: TeacherStep | None, shape: StepShape, loss: LossWorkspace
) -> dict[str, int]:
    root = student.shards.root
    layer = student.shards.largest("layers")
    work = {
        "student gathered: embedding, last norm": root.gathered_numel * shape.compute_bytes if shape.shard > 1 else 0,
        "student gathered: layers": gathered_bytes(layer, shape.compute_bytes)[0],
        "student weights cast (autocast)": _cast_bytes(student.shards, shape),
        "teacher gathered: embedding": 0,
        "teacher gathered: layers": 0,
        "teacher gathered: layer, as it arrives": 0,
        "teacher gathered: head, last norm": 0,
        "teacher weights restored from FP8": 0,
        "teacher activations": 0,
        "teacher hidden states": 0,
        "student activations": saved_activations(student.args, shape),
        "student layer, forward": max(layer_activations(student.args, shape, kind) for kind in student.args.spans()),
        "student layer, backward": layer_backward(student.args, shape),
        "layer gradients": _layer_gradients(student, shape.compute_bytes, shape),
        "layer gradients, being summed": _layer_gradients(student, 2 * shape.reduce_bytes, shape),
        "embedding gradients, being summed": _embedding_gradients(student, shape),
        "masks": mask_bytes(student.args.spans().values(), shape, shape.rows),
        "batch": BATCH_BYTES * shape.rows * shape.row_tokens,
        "loss: logits of a chunk": loss.logits,
        "loss: head gradient": loss.head_gradient,
        "loss: hidden states": loss.hidden,
        "loss: kept for backward": loss.kept,
    }
    if teacher is not None:
        work |= _teacher_at_work(teacher, shape)
        if not teacher.cached:
            work["masks"] += mask_bytes(_teacher_masks(student, teacher, shape), shape, teacher.rows(shape))
    return work


def _teacher_masks(student: StudentStep, teacher: TeacherStep, shape: StepShape) -> list[Span]:
    """Of the kinds of layers whose masks the teacher does not find among the student's."""
    own = set() if teacher.layout.tensor != shape.tensor or teacher.overlap else set(student.args.spans().values())
    return [span for span in teacher.args.spans().values() if span not in own]


def _teacher_at_work(teacher: TeacherStep, shape: StepShape) -> dict[str, int]:
    shards, element = teacher.shards, teacher.element_bytes
    sharded = shards.root.shard_degree > 1
    hidden = shape.tokens * teacher.args.hidden_size * element
    work = {
        "teacher gathered: head, last norm": shards.root.gathered_numel * element if sharded else 0,
        "teacher hidden states": hidden * (2 if teacher.overlap else 1),
    }
    if teacher.cached:
        return work
    layers, arriving = gathered_bytes(shards.largest("layers"), element)
    embedding, _ = gathered_bytes(shards.largest("embed_tokens"), element)
    if teacher.resident:
        # Gathered once, in the first step, before there was anything else; here all the time.
        layers = arriving = embedding = work["teacher gathered: head, last norm"] = 0
    return work | {
        "teacher gathered: embedding": embedding,
        "teacher gathered: layers": layers,
        "teacher gathered: layer, as it arrives": arriving,
        "teacher weights restored from FP8": restored_bytes(teacher),
        "teacher activations": teacher_activations(teacher, shape),
    }


def _cast_bytes(shards: ModelShards, shape: StepShape) -> int:
    """Autocast keeps a copy of every weight that it multiplied with until the forward pass ends."""
    if shape.shard > 1 or shape.compute_bytes == shape.parameter_bytes:
        return 0
    return shards.local_numel * shape.compute_bytes


def _layer_gradients(student: StudentStep, element_bytes: int, shape: StepShape) -> int:
    """One layer's whole gradients; the buffer in which they are summed lives beside that of the layer before."""
    if shape.shard == 1:
        return 0
    return sum(unit.gathered_numel for unit in student.shards.largest("layers")) * element_bytes


def _embedding_gradients(student: StudentStep, shape: StepShape) -> int:
    """The lookup's gradient beside the loss', their sum, and the buffer in which it is summed over ranks."""
    numel = student.args.vocab_size // shape.tensor * student.args.hidden_size
    if shape.shard == 1:
        return numel * (shape.compute_bytes + shape.parameter_bytes)
    return numel * 2 * shape.compute_bytes + student.shards.root.gathered_numel * shape.reduce_bytes


def _moments(
    student: StudentStep,
    shape: StepShape,
    loss: LossWorkspace,
    held: dict[str, int],
    work: dict[str, int],
    config: JobConfig,
) -> dict[str, int]:
    base = sum(held.values()) - held["gradients"] + work["masks"] + work["batch"]
    # From the second micro-batch on, gradients are there all the time.
    early = held["gradients"] if shape.micro_batches > 1 else 0
    running = max(work["teacher activations"], work["teacher gathered: layer, as it arrives"])
    running += work["teacher weights restored from FP8"]
    head = work["teacher gathered: head, last norm"]  # from the teacher's last layer to the end of the loss
    teacher = max(work["teacher gathered: layers"] + running, work["teacher gathered: embedding"]) + head
    beside = teacher if config.teacher.overlap and shape.micro_batches > 1 else 0
    root = work["student gathered: embedding, last norm"] + work["student weights cast (autocast)"]
    hidden = work["teacher hidden states"]
    kept = work["student activations"] + loss.kept
    layer = max(work["student layer, backward"], work["layer gradients, being summed"])
    layer += work["student gathered: layers"] + work["layer gradients"]
    forward = work["student gathered: layers"] + work["student layer, forward"] * (shape.checkpointing != "none")
    last = work["student activations"] // student.args.num_hidden_layers + work["layer gradients, being summed"]
    activations = work["student activations"]
    late = base + held["gradients"]
    return {
        "teacher forward": base + early + teacher,
        "student forward": base + early + root + hidden + head + activations + forward,
        "loss": base + early + root + hidden + head + activations + loss.total,
        "backward, last layer": base + early + root + hidden + kept + layer + beside,
        "backward, embedding": late + root + last + work["embedding gradients, being summed"] + beside,
        "optimizer": late + _optimizer_copies(config, held),
    }


def _optimizer_copies(config: JobConfig, held: dict[str, int]) -> int:
    """The root of the second moments, which only the fused implementation does not materialise for all parameters."""
    return held["parameters"] if config.optimizer.implementation == "foreach" else 0
