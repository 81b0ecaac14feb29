"""Names of the parts of a training step, as a profiler shows them.

A range costs a microsecond where nobody profiles. What FSDP2 does (its all-gathers and reductions) it names itself, as
"FSDP::...".
"""

from torch.profiler import record_function

DATA = "step: data"
TEACHER = "step: teacher forward"
STUDENT = "step: student forward"
LOSS = "step: loss"
BACKWARD = "step: backward"
GRADIENT_NORM = "step: gradient norm"
OPTIMIZER = "step: optimizer"

STEP_RANGES = (DATA, TEACHER, STUDENT, LOSS, BACKWARD, GRADIENT_NORM, OPTIMIZER)
"""In the order in which they begin; the loss runs inside the student's forward."""

step_range = record_function
"""`with step_range(DATA): ...`"""
