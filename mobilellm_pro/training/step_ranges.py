"""Names of the parts of a training step, as a profiler shows them.

What FSDP2 does (its all-gathers and reductions) it names itself, as "FSDP::...".
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

DATA = "step: data"
TEACHER = "step: teacher forward"
STUDENT = "step: student forward"
LOSS = "step: loss"
BACKWARD = "step: backward"
GRADIENT_NORM = "step: gradient norm"
OPTIMIZER = "step: optimizer"

STEP_RANGES = (DATA, TEACHER, STUDENT, LOSS, BACKWARD, GRADIENT_NORM, OPTIMIZER)
"""In the order in which they begin. The loss runs inside the student's forward, and makes the gradients of the head and
of the last hidden states there: the backward pass begins with those."""

step_range = record_function
"""`with step_range(DATA): ...`"""


@contextmanager
def profiler_without_gpu() -> Iterator[None]:
    """Around torchtitan's loop, which where there is no GPU asks torch's profiler to watch `None` beside the CPU."""
    profile = torch.profiler.profile

    def of_what_is_there(*, activities: Sequence[Any] | None = None, **options: Any) -> Any:
        return profile(activities=activities and [one for one in activities if one is not None], **options)

    vars(torch.profiler).update(profile=of_what_is_there)
    try:
        yield
    finally:
        vars(torch.profiler).update(profile=profile)
