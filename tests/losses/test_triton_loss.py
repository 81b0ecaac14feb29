"""The Triton kernels give the numbers of the definition: on a GPU, or without one in Triton's interpreter.

Without a GPU:  TRITON_INTERPRET=1 python -m pytest tests/losses/test_triton_loss.py

Shape suffixes: T tokens, V vocabulary, D student width, E teacher width.
"""

import os
from dataclasses import fields, replace
from importlib.util import find_spec

import pytest
import torch
from loss_definition import Case, random_case, truth
from test_linear_distillation import run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.gpu
if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(case: Case) -> Case:
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{k: v.to(DEVICE) for k, v in tensors.items() if isinstance(v, torch.Tensor)})


@pytest.mark.parametrize("vocabulary", [1, 7, 300, 4096, 9001])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 0.5, "kl_weight": 0.7, "ce_weight": 0.4},
        {"ce_weight": 1.0},
        {"kl_weight": 0.0, "ce_weight": 1.0},
        {"logit_scale": 3e3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_definition(vocabulary, settings, dtype):
    case = random_case(7, vocabulary, 6, 9, dtype=dtype, **settings)
    terms, *gradients = truth(case)
    reference, ours = on_device(case).leaves(), on_device(case).leaves()
    expected = run(reference, impl="torch")
    expected.loss.backward()
    result = run(ours, impl="triton", chunk_tokens=4)
    result.loss.backward()
    exact = dtype == torch.float32 and "logit_scale" not in settings
    for got, wanted in zip(result[1:], terms if exact else expected[1:], strict=True):
        # Logits of 1e4 are known to 1e-3 in fp32, and each term is a difference of such numbers.
        slack = 2e-2 if "logit_scale" in settings else 1e-4
        assert abs(got.item() - wanted.item()) <= 1e-5 * abs(wanted.item()) + slack
    for i, leaf in enumerate((ours.student_hidden, ours.student_head)):
        other = (reference.student_hidden, reference.student_head)[i].grad.double().cpu()
        wanted = gradients[i] if exact else other
        tolerance = 1e-5 if exact else 1e-2
        assert (leaf.grad.double().cpu() - wanted).norm() <= tolerance * (wanted.norm() + case.weights.sum())


def test_identical_teacher_and_student():
    case = random_case(9, 301, 16, 16, dtype=torch.bfloat16, logit_scale=5)
    case = on_device(replace(case, teacher_hidden=case.student_hidden, teacher_head=case.student_head))
    ours = case.leaves()
    result = run(ours, impl="triton")
    result.loss.backward()
    assert abs(result.kl.item()) < 1e-5
    assert ours.student_hidden.grad.abs().max() < 1e-5


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_accurate_mode_and_memory_at_full_size():
    torch.manual_seed(0)
    hidden, head = torch.randn(16384, 1280), torch.randn(202048, 1280) / 20
    teacher = (torch.randn(16384, 5120), torch.randn(202048, 5120) / 40)
    hidden, head, *teacher = (x.to("cuda", torch.bfloat16) for x in (hidden, head, *teacher))
    case = Case(hidden, head, *teacher, torch.zeros(16384, dtype=torch.int64, device="cuda"), torch.ones(16384).cuda())
    ours = case.leaves()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(ours).loss.backward()
    sums = head.numel() * 4
    assert torch.cuda.max_memory_allocated() - before - sums < 2 * 2**30
