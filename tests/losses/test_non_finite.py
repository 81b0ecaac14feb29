"""A loss that is not a number stops the step with the name of what caused it.

Shape suffixes: none.
"""

import pytest
import torch
from loss_definition import random_case
from test_linear_distillation import run

from mobilellm_pro.losses import raise_if_not_finite

NAMES = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")


@pytest.mark.parametrize("impl", ["torch", "chunked"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_names_step_rank_and_tensor(impl, value, name):
    case = random_case(6, 40, 4, 5, dtype=torch.float32, zero_weights=0.0)
    getattr(case, name)[3, 2] = value
    loss = run(case, impl=impl).loss
    kind = "1 NaN, 0 infinite" if value != value else "0 NaN, 1 infinite"
    with pytest.raises(FloatingPointError, match=rf"step 17 on rank 5: {name} .*{kind}, first at \[3, 2\]$"):
        raise_if_not_finite(loss, step=17, rank=5, labels=case.labels, **{n: getattr(case, n) for n in NAMES})


def test_finite_loss_is_silent_and_unexplained_ones_say_so():
    raise_if_not_finite(torch.tensor(1.0), step=1, rank=0, hidden=torch.tensor([torch.nan]))
    with pytest.raises(FloatingPointError, match="hidden, teacher: finite here, so look at other ranks"):
        raise_if_not_finite(torch.tensor(torch.nan), step=1, rank=0, hidden=torch.ones(3), teacher=None)
