"""How many tokens a training reads, and how long it will take.

Where a card is named its time is that of a plan (`plan.py`), with its assumptions. Else trainings that have run on this
machine say how fast others like them, the same model and objective, will be; of what has no like nothing is said.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mobilellm_pro.config import JobConfig
from mobilellm_pro.model.hugging_face import read_config, teacher_args
from mobilellm_pro.model.registry import configured_args
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.model.teacher import FLAVORS
from mobilellm_pro.pipeline.ledger import Record
from mobilellm_pro.pipeline.phase_kinds import Products, training_job, world_size
from mobilellm_pro.pipeline.phases import Phase
from mobilellm_pro.pipeline.plan import rank_plan
from mobilellm_pro.pipeline.rank_plan import Assumptions
from mobilellm_pro.pipeline.step_time import HARDWARE, Links
from mobilellm_pro.training.loader import step_rows

ASSUMED = Assumptions(0.4, Links(450e9, 50e9, 8), 5e9, None, None)
"""Those of the verb `plan`."""


@dataclass(frozen=True)
class Estimate:
    """Of one training."""

    tokens: int
    ranks: int
    seconds: float | None


def estimate_trainings(
    phases: Mapping[str, Phase], products: Products, done: Mapping[str, Record], hardware: str | None
) -> dict[str, Estimate]:
    """Tokens, ranks and seconds of the trainings among `phases`, by name.

    Args:
        phases: by name.
        products: of those that are done.
        done: their records.
        hardware: a key of `step_time.HARDWARE`, or None.

    Raises:
        ValueError: no such hardware.
    """
    if hardware is not None and hardware not in HARDWARE:
        raise ValueError(f"--hardware {hardware}: unknown; expected {' or '.join(HARDWARE)}")
    jobs = {phase.name: training_job(phase, products) for phase in phases.values() if phase.kind == "train"}
    ranks = {name: world_size(phases[name], config) for name, config in jobs.items()}
    tokens = {name: _tokens(config, ranks[name]) for name, config in jobs.items()}
    speeds = {
        _likeness(jobs[name]): tokens[name] / record.wall_seconds
        for name, record in done.items()
        if name in jobs and record.wall_seconds > 0
    }
    found: dict[str, Estimate] = {}
    for name, config in jobs.items():
        seconds = None if _likeness(config) not in speeds else tokens[name] / speeds[_likeness(config)]
        if hardware is not None:
            seconds = _planned_seconds(config, ranks[name], hardware)
        found[name] = Estimate(tokens[name], ranks[name], seconds)
    return found


def _tokens(config: JobConfig, ranks: int) -> int:
    parallelism = config.parallelism
    batch_ranks = max(1, ranks // (parallelism.tensor_parallel_degree * parallelism.context_parallel_degree))
    return config.training.steps * step_rows(config, batch_ranks) * config.training.seq_len


def _likeness(config: JobConfig) -> tuple[str, ...]:
    return config.model.name, config.model.flavor, config.distill.objective, config.quantization.scheme


def _planned_seconds(config: JobConfig, ranks: int, hardware: str) -> float | None:
    student = configured_args(config)
    if not isinstance(student, StudentArgs) or config.quantization.scheme != "none":
        return None
    folder = config.teacher.path
    teacher = None
    if config.distill.objective != "ce":
        has_config = (Path(folder) / "config.json").is_file()
        teacher = teacher_args(read_config(folder), folder) if has_config else FLAVORS["scout"]
    planned = rank_plan(config, student, teacher, ranks, ASSUMED, {hardware: HARDWARE[hardware]})
    return planned.times[hardware].total * config.training.steps
