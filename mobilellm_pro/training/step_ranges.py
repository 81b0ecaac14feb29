"""Names of the parts of a training step, as a profiler shows them.

What FSDP2 does (its all-gathers and reductions) it names itself, as
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
"""In the order in which they begin. The loss runs inside the student's forward, and makes the gradients of the head and
of the last hidden states there: the backward pass begins with those."""

step_range = record_function
"""`with step_range(DATA): ...`"""
