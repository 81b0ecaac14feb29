"""What a plan takes as given, and what it finds for one number of ranks."""

from dataclasses import dataclass

from mobilellm_pro.pipeline.peak_memory import RankMemory
from mobilellm_pro.pipeline.step_shape import StepShape
from mobilellm_pro.pipeline.step_time import Links, StepTime
from mobilellm_pro.pipeline.step_work import Transfer


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes as given."""

    utilisation: float
    """Share of the card's bf16 peak at which all products run, recomputed ones included."""

    links: Links
    allowance_bytes: float
    """CUDA context, NCCL's buffers, the allocator's fragmentation: of the card, not of the plan."""

    document_tokens: int | None
    tokens: int | None


@dataclass(frozen=True)
class RankPlan:
    """One number of ranks."""

    shape: StepShape
    student_parameters: int
    teacher_parameters: int
    teacher_degrees: dict[str, int]
    memory: RankMemory
    flops: dict[str, float]
    """Of a step on all ranks, by what computes them."""

    busiest_flops: dict[str, float]
    """The same for the busiest rank, of "student", "teacher" and "loss"."""

    transfers: list[Transfer]
    times: dict[str, StepTime]
    """By key of `HARDWARE`."""

    steps: int
