"""A teacher known by its top k: against the definition over k + 1 outcomes, and against the full KL.

Shape suffixes: T tokens, K ids of a token, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch
from loss_definition import Case, random_case, truth
from torch import Tensor

from mobilellm_pro.losses import DistillationLoss, linear_top_k_distillation

IMPLEMENTATIONS = ["torch", "chunked"]


def top_k(case: Case, k: int) -> tuple[Tensor, Tensor]:
    logits = case.teacher_hidden.double() @ case.teacher_head.double().T / case.temperature
    log_probs, ids = logits.log_softmax(-1).topk(k, dim=-1)
    return ids, log_probs


def definition(case: Case, ids: Tensor, log_probs: Tensor) -> Tensor:
    """KL over the k ids and the rest together, fp64; needs 0 < k < V."""
    q = (case.student_hidden @ case.student_head.T / case.temperature).softmax(-1)
    rest = torch.ones_like(q).scatter(1, ids, 0)
    q = torch.cat([q.gather(1, ids), (q * rest).sum(-1, keepdim=True)], 1)
    p = torch.cat([log_probs.exp(), 1 - log_probs.exp().sum(-1, keepdim=True)], 1)
    return case.temperature**2 * (case.weights * (p * (p.log() - q.log())).sum(-1)).sum()


def run(case: Case, ids: Tensor, log_probs: Tensor, **keywords: object) -> DistillationLoss:
    return linear_top_k_distillation(
        case.student_hidden,
        case.student_head,
        ids,
        log_probs,
        case.labels,
        token_weights=case.weights,
        kl_weight=case.kl_weight,
        ce_weight=case.ce_weight,
        temperature=case.temperature,
        **keywords,
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 39])
def test_matches_definition(impl, temperature, k):
    case = random_case(11, 40, 5, 7, seed=k, temperature=temperature, kl_weight=0.7, ce_weight=0.4)
    ids, log_probs = top_k(case, k)
    exact, ours = case.leaves(), case.leaves()
    ce = truth(case)[0][1]
    kl = definition(exact, ids, log_probs)
    gradients = torch.autograd.grad(kl, (exact.student_hidden, exact.student_head))
    result = run(ours, ids, log_probs, impl=impl, chunk_tokens=4)
    torch.testing.assert_close(result.kl, kl.detach())
    torch.testing.assert_close(result.ce, ce)
    torch.testing.assert_close(result.loss.detach(), 0.7 * kl.detach() + 0.4 * ce)
    result.loss.backward()
    _, *ce_gradients = truth(replace(case, kl_weight=0.0, ce_weight=0.4))
    for leaf, a, b in zip((ours.student_hidden, ours.student_head), gradients, ce_gradients, strict=True):
        torch.testing.assert_close(leaf.grad, 0.7 * a + b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_whole_vocabulary_equals_the_full_loss(impl, dtype, temperature):
    case = random_case(9, 40, 5, 7, dtype=dtype, temperature=temperature)
    terms, *gradients = truth(case)
    ours = case.leaves()
    result = run(ours, *top_k(case, 40), impl=impl)
    result.loss.backward()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(result.kl.double(), terms[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.teacher_entropy.double(), terms[3], rtol=tolerance, atol=tolerance)
    for leaf, gradient in zip((ours.student_hidden, ours.student_head), gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=tolerance, atol=tolerance)


def test_never_above_the_full_loss_and_rising_with_k():
    case = random_case(9, 200, 5, 7, zero_weights=0.0)
    full = truth(case)[0][0]
    values = [run(case, *top_k(case, k)).kl for k in (1, 3, 10, 50, 199)]
    assert all(a < b for a, b in zip(values, [*values[1:], full], strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_unused_places_and_extreme_logits(impl):
    case = random_case(9, 60, 5, 7, dtype=torch.float32)
    ids, log_probs = top_k(case, 6)
    padded = torch.cat([ids, torch.full((9, 3), -1)], 1), torch.cat([log_probs, torch.zeros(9, 3)], 1)
    torch.testing.assert_close(run(case, *padded, impl=impl), run(case, ids, log_probs, impl=impl))
    extreme = replace(case, student_head=case.student_head * 3e3).leaves()
    result = run(extreme, ids, log_probs, impl=impl)
    result.loss.backward()
    assert result.loss.isfinite()
    assert extreme.student_hidden.grad.isfinite().all()


def test_refused_by_name():
    case = random_case(9, 60, 5, 7, dtype=torch.float32)
    ids, log_probs = top_k(case, 6)
    for bad_ids, bad_log_probs, message in (
        (ids + 60, log_probs, r"teacher_ids: expected ids in \[0, 60\)"),
        (ids.int(), log_probs, "teacher_ids dtype: expected torch.int64"),
        (ids[:5], log_probs[:5], "teacher_ids leading dimensions"),
        (ids, log_probs[:, :5], r"teacher_log_probs shape: expected \(9, 6\)"),
        (ids, ids, "teacher_log_probs: expected floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            run(case, bad_ids, bad_log_probs)
