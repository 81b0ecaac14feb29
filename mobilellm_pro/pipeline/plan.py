"""The `plan` verb: what a job of many ranks will need, before anyone waits for these ranks.

    mobilellm-pro plan train_configs/mobilellm_pro_1b/1_language.toml --world-size 64 --teacher scout
    bash launch/dry_run.sh     both long phases of the 1B run, on 64, 256 and 1,024 ranks

Both models are built on meta tensors by the code that trains them, as rank 0 of a fake process group, so that sizes of
shards are exact. Activations, operations and bytes moved are formulas (`step_memory.py`, `step_work.py`), which the
tests compare with real steps. Times are those under stated assumptions (`step_time.py`). One process, no memory, no
data, no weights: of the teacher only config.json is read.
"""

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any, Literal

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.config import JobConfig, JobError, check_world_size, smallest_world_size
from mobilellm_pro.model.hugging_face import read_config, teacher_args
from mobilellm_pro.model.registry import configured_args
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.model.teacher import FLAVORS, TeacherArgs
from mobilellm_pro.model.teacher_layout import degree_problems
from mobilellm_pro.pipeline.peak_memory import StudentStep, rank_memory
from mobilellm_pro.pipeline.plan_report import report
from mobilellm_pro.pipeline.rank_plan import Assumptions, RankPlan
from mobilellm_pro.pipeline.step_memory import TeacherStep
from mobilellm_pro.pipeline.step_shape import BYTES, StepShape, step_shape
from mobilellm_pro.pipeline.step_time import HARDWARE, Hardware, Links, step_time
from mobilellm_pro.pipeline.step_work import loss_flops, student_flops, teacher_flops, transfers
from mobilellm_pro.training.fake_ranks import fake_ranks, frozen_teacher_layout, student_shards, teacher_shards
from mobilellm_pro.training.preflight import student_degree_problems, vocabulary_problems

LOGIT_PASSES = 5
"""Times that element-wise work of the loss reads or writes every logit: both models' twice, and the gradient once."""

OPTIMIZER_PASSES = 7
"""Parameter, gradient and two moments are read, all but the gradient written."""


def plan(
    config: JobConfig,
    config_path: str,
    *,
    world_size: list[int] | None = None,
    hardware: list[str] | None = None,
    mfu: float = 0.4,
    tokens: int | None = None,
    document_tokens: int | None = None,
    teacher: Literal["configured", "scout"] = "configured",
    nvlink_gb: float = 450.0,
    network_gb: float = 50.0,
    ranks_per_node: int = 8,
    allowance_gb: float = 5.0,
    json: str | None = None,
) -> list[RankPlan]:
    """Print what a job needs on so many ranks: memory of a rank, operations, bytes moved, time of a step.

    Builds student and teacher on meta tensors in a fake process group: one process, no memory, no data, no weights.
    Files that the configuration names need not exist, but for the teacher's config.json.

    Args:
        config: TOML file of a job that trains a student.
        world_size: numbers of ranks, one column each. Default: the least that the degrees allow.
        hardware: h100, h200 or both, the default.
        mfu: share of the card's bf16 peak at which products run, recomputed ones included.
        tokens: tokens of the phase, for the days. Default: training.steps steps.
        document_tokens: length of documents, which decides how many keys a query sees under a block-causal mask.
            Default: a row is one document, which costs most.
        teacher: "scout" plans with Llama 4 Scout's architecture without its config.json.
        nvlink_gb: GB/s that a rank receives from its own node.
        network_gb: GB/s that a rank receives from other nodes.
        ranks_per_node: ranks of a node.
        allowance_gb: GB of a card for CUDA's context, NCCL's buffers and fragmentation, which no formula covers.
        json: file to write everything to, in bytes, operations and seconds.

    Raises:
        JobError: degrees or batch that do not fit a number of ranks, or the models.
        ValueError: the job trains no student, or a quantized one, or an option is out of range.
        FileNotFoundError: the teacher has no config.json.
    """
    links = Links(nvlink_gb * 1e9, network_gb * 1e9, ranks_per_node)
    given = Assumptions(mfu, links, allowance_gb * 1e9, document_tokens, tokens)
    cards = _cards(hardware)
    _check_options(given, ranks_per_node)
    sizes = [smallest_world_size(config)] if world_size is None else world_size
    student_args = configured_args(config)
    if not isinstance(student_args, StudentArgs):
        raise ValueError(f"model.name = {config.model.name!r}: a plan is for the student, mobilellm_pro")
    if config.quantization.scheme != "none":
        raise ValueError(
            f'quantization.scheme = "{config.quantization.scheme}": a plan knows neither fake quantization nor a '
            "student as teacher; benchmarks/qat_step.py measures what a step costs"
        )
    args = None if config.distill.objective == "ce" else _teacher_architecture(config, teacher)
    problems = [str(problem) for size in sizes for problem in check_world_size(config, size)]
    source = "Llama 4 Scout" if teacher == "scout" else config.teacher.path
    problems += _model_problems(config, student_args, args, source)
    if problems:
        raise JobError(config_path, list(dict.fromkeys(problems)))
    plans = [rank_plan(config, student_args, args, size, given, cards) for size in sizes]
    print(report(config, config_path, plans, given, cards))
    if json is not None:
        write_atomically(Path(json), dumps(_as_json(config_path, plans, given, cards), indent=2))
    return plans


def rank_plan(
    config: JobConfig,
    student_args: StudentArgs,
    args: TeacherArgs | None,
    world_size: int,
    given: Assumptions,
    cards: dict[str, Hardware],
) -> RankPlan:
    """The plan for one number of ranks, whose degrees have been checked."""
    shape = step_shape(config, world_size, document_tokens=given.document_tokens)
    with fake_ranks(config, world_size) as dims:
        student = StudentStep(student_args, student_shards(config, dims))
        teacher = None if args is None else teacher_step(config, args, world_size)
    moved = transfers(student, teacher, shape)
    busiest = _flops(config, student, teacher, shape, everywhere=False)
    average = _flops(config, student, teacher, shape, everywhere=True)
    by_model = {
        "student": busiest["student forward"] + busiest["student backward"] + busiest["student recomputed"],
        "teacher": busiest["teacher forward"],
        "loss": busiest["loss, student head"] + busiest["loss, teacher head"],
    }
    traffic = _memory_traffic(student, teacher, shape)
    times = {
        key: step_time(by_model, moved, traffic, card, given.links, utilisation=given.utilisation)
        for key, card in cards.items()
    }
    layout = None if teacher is None else teacher.layout
    return RankPlan(
        shape=shape,
        student_parameters=student.shards.num_parameters,
        teacher_parameters=0 if teacher is None else teacher.shards.num_parameters,
        teacher_degrees={} if layout is None else {k: getattr(layout, k) for k in ("tensor", "expert", "shard")},
        memory=rank_memory(config, student, teacher, shape),
        flops={kind: amount * world_size for kind, amount in average.items()},
        busiest_flops=by_model,
        transfers=moved,
        times=times,
        steps=config.training.steps,
    )


def teacher_step(config: JobConfig, args: TeacherArgs, world_size: int) -> TeacherStep:
    """The teacher's part of a step; called inside `fake_ranks`."""
    section = config.teacher
    return TeacherStep(
        args=args,
        layout=frozen_teacher_layout(config, world_size),
        shards=teacher_shards(config, args, world_size),
        element_bytes=BYTES[section.dtype],
        cached=section.cache == "read",
        quantized=section.quantization == "float8",
        resident=section.parallelism.resident,
        overlap=section.overlap,
    )


def _flops(
    config: JobConfig, student: StudentStep, teacher: TeacherStep | None, shape: StepShape, *, everywhere: bool
) -> dict[str, float]:
    own = student_flops(config, student.args, shape, everywhere=everywhere)
    heads = loss_flops(
        config,
        student.args,
        None if teacher is None else teacher.args.hidden_size,
        0 if teacher is None else teacher.element_bytes,
        shape,
    )
    return {
        **{f"student {kind}": amount for kind, amount in own.items()},
        "teacher forward": 0.0 if teacher is None else teacher_flops(config, teacher, shape, everywhere=everywhere),
        **{f"loss, {kind}": amount for kind, amount in heads.items()},
    }


def _memory_traffic(student: StudentStep, teacher: TeacherStep | None, shape: StepShape) -> dict[str, float]:
    element = shape.compute_bytes if teacher is None else max(shape.compute_bytes, teacher.element_bytes)
    logits = shape.tokens * shape.micro_batches * student.args.vocab_size // shape.tensor
    return {
        "optimizer": OPTIMIZER_PASSES * student.shards.local_numel * shape.parameter_bytes,
        "logits": LOGIT_PASSES * logits * element,
    }


def _teacher_architecture(config: JobConfig, teacher: str) -> TeacherArgs:
    folder = config.teacher.path
    if teacher == "scout":
        return FLAVORS["scout"]
    if teacher != "configured":
        raise ValueError(f'--teacher {teacher}: expected "configured" or "scout"')
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}/config.json: not found, and a plan needs the teacher's architecture; "
            "with --teacher scout it takes that of Llama 4 Scout"
        )
    return teacher_args(read_config(folder), folder)


def _model_problems(config: JobConfig, student: StudentArgs, teacher: TeacherArgs | None, source: str) -> list[str]:
    """Degrees that do not divide what they split, and vocabularies that differ."""
    found = list(student_degree_problems(config))
    if teacher is not None:
        found += vocabulary_problems(teacher, student, source)
        found += degree_problems(teacher, config.teacher.parallelism, config.teacher.dtype, source)
    return found


def _cards(names: list[str] | None) -> dict[str, Hardware]:
    chosen = list(HARDWARE) if names is None else names
    unknown = [name for name in chosen if name not in HARDWARE]
    if unknown:
        raise ValueError(f"--hardware {' '.join(unknown)}: unknown; expected {' or '.join(HARDWARE)}")
    return {name: HARDWARE[name] for name in chosen}


def _check_options(given: Assumptions, ranks_per_node: int) -> None:
    if not 0 < given.utilisation <= 1:
        raise ValueError(f"--mfu {given.utilisation}: expected a share above 0, up to 1")
    positive = {
        "--nvlink-gb": given.links.node_bandwidth,
        "--network-gb": given.links.network_bandwidth,
        "--ranks-per-node": ranks_per_node,
        "--tokens": given.tokens,
        "--document-tokens": given.document_tokens,
    }
    for option, value in positive.items():
        if value is not None and value <= 0:
            raise ValueError(f"{option} {value}: expected a positive number")
    if given.allowance_bytes < 0:
        raise ValueError(f"--allowance-gb {given.allowance_bytes / 1e9}: expected zero or more")


def _as_json(config_path: str, plans: list[RankPlan], given: Assumptions, cards: dict[str, Hardware]) -> dict[str, Any]:
    described = []
    for one in plans:
        record = asdict(one)
        record["shape"] |= {"step_rows": one.shape.step_rows, "step_tokens": one.shape.step_tokens}
        record["memory"] |= {"peak": one.memory.peak, "peak_moment": one.memory.peak_moment}
        for entry, transfer in zip(record["transfers"], one.transfers, strict=True):
            del entry["members"]
            entry["ranks"] = transfer.ranks
        for key, time in one.times.items():
            record["times"][key]["total"] = time.total
        described.append(record)
    cards_text = {key: asdict(card) for key, card in cards.items()}
    return {"config": config_path, "assumptions": asdict(given), "hardware": cards_text, "plans": described}
