"""A loss that is not a number is traced to the input that caused it.

Shape suffixes: none.
"""

import pytest
import torch
from loss_definition import random_case
from test_linear_distillation import run

from mobilellm_pro.losses import non_finite_reports

NAMES = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")


@pytest.mark.parametrize("impl", ["torch", "chunked"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_shows_it_and_the_report_names_the_tensor(impl, value, name):
    case = random_case(6, 40, 4, 5, dtype=torch.float32, zero_weights=0.0)
    getattr(case, name)[3, 2] = value
    assert not run(case, impl=impl).loss.isfinite()
    (report,) = non_finite_reports(labels=case.labels, **{n: getattr(case, n) for n in NAMES})
    kind = "1 NaN, 0 infinite" if value != value else "0 NaN, 1 infinite"
    assert report == f"{name} {list(getattr(case, name).shape)}: {kind}, first at [3, 2]"


def test_finite_tensors_integers_and_missing_ones_have_no_report():
    assert non_finite_reports(hidden=torch.ones(3), labels=torch.tensor([1]), teacher=None) == []
