"""Every implementation of the loss against the definition in fp64, over random shapes and settings.

Shape suffixes: T tokens, V vocabulary, D student width, E teacher width.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_definition import Case, plain_torch, random_case, relative_error, truth

from mobilellm_pro.losses import DistillationLoss, linear_cross_entropy, linear_distillation, linear_forward_kl
from mobilellm_pro.losses.problem import checked_problem

IMPLEMENTATIONS = ["torch", "chunked"]
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(case: Case, **keywords: object) -> DistillationLoss:
    return linear_distillation(
        case.student_hidden,
        case.student_head,
        case.teacher_hidden,
        case.teacher_head,
        case.labels,
        token_weights=case.weights,
        kl_weight=case.kl_weight,
        ce_weight=case.ce_weight,
        temperature=case.temperature,
        **keywords,
    )


def assert_matches(case: Case, tolerance: float, upstream: float = 1.0, **keywords: object) -> None:
    terms, grad_hidden, grad_head = truth(case, upstream)
    ours = case.leaves()
    result = run(ours, **keywords)
    (result.loss * upstream).backward()
    expected_loss = case.kl_weight * terms[0] + case.ce_weight * terms[1]
    # Terms are differences of log sums, so their rounding scales with the weights' sum as well as with themselves.
    slack = tolerance * (1 + case.weights.sum().item()) * 10
    assert abs(result.loss.item() - expected_loss.item()) <= tolerance * abs(expected_loss.item()) + slack
    for got, expected in zip(result[1:], terms, strict=True):
        assert abs(got.item() - expected.item()) <= tolerance * abs(expected.item()) + slack
    scale = upstream * case.weights.sum().item()
    for got, expected in ((ours.student_hidden.grad, grad_hidden), (ours.student_head.grad, grad_head)):
        assert (got.double() - expected).norm() <= tolerance * (expected.norm() + scale)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 33), st.integers(1, 65))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@quick
@given(
    shape=shapes,
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)]),
    zero_weights=st.sampled_from([0.0, 0.5, 1.0]),
    chunk_tokens=st.sampled_from([None, 1, 7]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    upstream=st.sampled_from([1.0, 0.3, 8.0]),
)
def test_matches_definition(impl, shape, seed, temperature, weights, zero_weights, chunk_tokens, dtype, upstream):
    case = random_case(
        *shape,
        seed=seed,
        dtype=dtype,
        zero_weights=zero_weights,
        temperature=temperature,
        kl_weight=weights[0],
        ce_weight=weights[1],
    )
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert_matches(case, tolerance, upstream, impl=impl, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bf16_is_no_worse_than_plain_torch(impl):
    # Single draws differ by chance in the last bf16 bit, so errors are compared over many shapes together.
    errors = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(30):
        case = random_case(5 + seed, 11 + 9 * seed, 3 + seed, 7 + 2 * seed, seed=seed, dtype=torch.bfloat16)
        _, *exact = truth(case)
        plain, ours = case.leaves(), case.leaves()
        plain_torch(
            plain.student_hidden, plain.student_head, plain.teacher_hidden, plain.teacher_head, plain.weights
        ).backward()
        run(ours, impl=impl, chunk_tokens=13).loss.backward()
        for row, leaves in enumerate((plain, ours)):
            for column, gradient in enumerate((leaves.student_hidden.grad, leaves.student_head.grad)):
                errors[row, column] += relative_error(gradient, exact[column])
    assert (errors[1] <= 1.03 * errors[0] + 30e-6).all(), errors / 30


@quick
@given(shape=shapes, seed=st.integers(0, 999), chunk_tokens=st.sampled_from([None, 1, 7]))
def test_fp32_gradients_are_no_worse_than_plain_torch(shape, seed, chunk_tokens):
    case = random_case(*shape, seed=seed, dtype=torch.float32)
    _, *exact = truth(case)
    plain, ours = case.leaves(), case.leaves()
    inputs = (plain.student_hidden, plain.student_head, plain.teacher_hidden, plain.teacher_head, plain.weights)
    plain_torch(*inputs).backward()
    run(ours, impl="chunked", chunk_tokens=chunk_tokens).loss.backward()
    for name, expected in zip(("student_hidden", "student_head"), exact, strict=True):
        error, plain_error = (relative_error(getattr(x, name).grad, expected) for x in (ours, plain))
        assert error <= plain_error + 1e-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_identical_teacher_and_student(impl, dtype):
    case = random_case(9, 301, 16, 16, dtype=dtype, logit_scale=5)
    case = replace(case, teacher_hidden=case.student_hidden, teacher_head=case.student_head)
    ours = case.leaves()
    result = run(ours, impl=impl)
    result.loss.backward()
    assert result.kl.item() == 0
    # Ours subtracts two equal softmaxes; autograd's own backward of log-softmax leaves their rounding.
    rounding = 1e-5 if impl == "torch" else 0.0
    assert ours.student_hidden.grad.abs().max() <= rounding
    assert ours.student_head.grad.abs().max() <= rounding


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_large_logits_stay_finite_and_right(impl, temperature):
    case = random_case(12, 77, 8, 8, dtype=torch.float32, logit_scale=3e3, temperature=temperature, ce_weight=0.5)
    terms, grad_hidden, grad_head = truth(case)
    ours = case.leaves()
    result = run(ours, impl=impl, chunk_tokens=5)
    result.loss.backward()
    assert relative_error(result.kl, terms[0]) < 1e-5
    # Logits near 1e4 are themselves known to 1e-3 in fp32, and a softmax turns that into a relative error of 1e-3.
    assert relative_error(ours.student_hidden.grad, grad_hidden) < 5e-3
    assert relative_error(ours.student_head.grad, grad_head) < 5e-3


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tokens_of_weight_zero_are_not_looked_at(impl):
    case = random_case(10, 50, 4, 6, dtype=torch.float32)
    dead = case.weights == 0
    assert dead.any()
    clean, dirty = case.leaves(), case.leaves()
    with torch.no_grad():
        dirty.student_hidden[dead] = torch.nan
        dirty.teacher_hidden[dead] = torch.inf
    results = [run(x, impl=impl, chunk_tokens=4) for x in (clean, dirty)]
    for result in results:
        result.loss.backward()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(dirty.student_head.grad, clean.student_head.grad, rtol=0, atol=0)
    torch.testing.assert_close(dirty.student_hidden.grad, clean.student_hidden.grad, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ignored_labels(impl):
    case = random_case(10, 50, 4, 6, ignored=0.5, ce_weight=1.0)
    present = (case.labels != -100).double()
    arguments = (case.student_hidden, case.student_head, case.teacher_hidden, case.teacher_head, case.labels)
    implied = linear_distillation(*arguments, ce_weight=1.0, impl=impl)
    given_weights = run(replace(case, weights=present), impl=impl)
    torch.testing.assert_close(implied, given_weights)
    all_ignored = replace(case, labels=torch.full_like(case.labels, -100))
    result = run(all_ignored, impl=impl)
    assert result.ce == 0 and result.teacher_ce == 0 and result.kl > 0
    assert linear_distillation(*arguments[:4], all_ignored.labels, impl=impl).loss == 0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_wanted_gradient(impl):
    case = random_case(11, 40, 5, 7, ce_weight=0.5)
    _, *expected = truth(case)
    for position, name in enumerate(("student_hidden", "student_head")):
        ours = replace(case, **{name: getattr(case, name).clone().requires_grad_()})
        run(ours, impl=impl, chunk_tokens=4).loss.backward()
        torch.testing.assert_close(getattr(ours, name).grad, expected[position])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_accumulates_over_micro_batches_and_repeated_backward(impl):
    case = random_case(12, 40, 5, 7, ce_weight=0.5)
    _, grad_hidden, grad_head = truth(case)
    ours = case.leaves()
    halves = [
        replace(
            ours,
            student_hidden=ours.student_hidden[rows],
            teacher_hidden=ours.teacher_hidden[rows],
            labels=ours.labels[rows],
            weights=ours.weights[rows],
        )
        for rows in (slice(0, 5), slice(5, 12))
    ]
    for half in halves:
        loss = run(half, impl=impl).loss
        (loss / 3).backward(retain_graph=True)
        (loss * 2 / 3).backward()
    torch.testing.assert_close(ours.student_head.grad, grad_head)
    torch.testing.assert_close(ours.student_hidden.grad, grad_hidden)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_non_contiguous_and_leading_dimensions(impl):
    case = random_case(12, 40, 6, 8, dtype=torch.float32, ce_weight=0.5)
    _, grad_hidden, grad_head = truth(case)
    hidden = case.student_hidden.T.contiguous().T.reshape(3, 4, 6).transpose(0, 1).contiguous().transpose(0, 1)
    head = torch.stack([case.student_head, case.student_head], 1)[:, 0]
    assert not hidden.is_contiguous() and not head.is_contiguous()
    hidden, head = hidden.requires_grad_(), head.detach().requires_grad_()
    linear_distillation(
        hidden,
        head,
        case.teacher_hidden.reshape(3, 4, 8),
        case.teacher_head.T.contiguous().T,
        case.labels.reshape(3, 4),
        token_weights=case.weights.reshape(3, 4),
        ce_weight=0.5,
        impl=impl,
    ).loss.backward()
    assert hidden.grad.shape == hidden.shape
    torch.testing.assert_close(hidden.grad.reshape(12, 6).double(), grad_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.grad.double(), grad_head, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck(temperature):
    case = random_case(5, 13, 3, 4, temperature=temperature, kl_weight=0.8, ce_weight=0.3).leaves()

    def loss(hidden, head):
        return run(replace(case, student_hidden=hidden, student_head=head), impl="chunked", chunk_tokens=2).loss

    assert torch.autograd.gradcheck(loss, (case.student_hidden, case.student_head))


def test_faces_agree_and_values_need_no_gradient():
    case = random_case(8, 30, 4, 6, dtype=torch.float32).leaves()
    arguments = (case.student_hidden, case.student_head, case.teacher_hidden, case.teacher_head)
    result = run(case)
    kl = linear_forward_kl(*arguments, token_weights=case.weights)
    ce = linear_cross_entropy(*arguments[:2], case.labels, token_weights=case.weights)
    assert kl.requires_grad and ce.requires_grad
    torch.testing.assert_close(kl.detach(), result.kl)
    torch.testing.assert_close(ce.detach(), result.ce)
    with torch.no_grad():
        silent = run(case)
    assert not silent.loss.requires_grad
    torch.testing.assert_close(silent[1:], result[1:])
    assert not any(term.requires_grad for term in result[1:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_tokens(impl):
    case = random_case(0, 30, 4, 6, dtype=torch.float32).leaves()
    result = run(case, impl=impl)
    result.loss.backward()
    assert result.loss == 0 and case.student_head.grad.abs().max() == 0


def test_accurate_mode_near_the_teacher():
    # The student's logits are within 1 % of its teacher's, so bf16 logits would be mostly rounding.
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(24, 64, generator=g), torch.randn(3000, 64, generator=g) / 2
    teacher_hidden = torch.cat([hidden, torch.zeros(24, 32)], 1)
    noise = 0.005 * torch.randn(3000, 96, generator=g)
    teacher_head = torch.cat([head.bfloat16().float(), torch.zeros(3000, 32)], 1) + noise
    case = Case(hidden, head, teacher_hidden, teacher_head, torch.zeros(24, dtype=torch.int64), torch.ones(24))
    case = case.to(torch.bfloat16)
    _, *exact = truth(case)
    errors = {}
    for impl, fp32_logits in (("chunked", False), ("chunked", True), ("torch", True)):
        ours = case.leaves()
        run(ours, impl=impl, fp32_logits=fp32_logits, chunk_tokens=7).loss.backward()
        gradients = (ours.student_hidden.grad, ours.student_head.grad)
        errors[impl, fp32_logits] = max(relative_error(a, b) for a, b in zip(gradients, exact, strict=True))
    assert errors["chunked", True] < 0.01
    assert errors["torch", True] < 0.01
    assert errors["chunked", False] > 0.05


def test_chunks_are_equal_and_fit_the_budget(monkeypatch):
    from mobilellm_pro.losses import token_chunks

    case = random_case(1000, 64, 4, 6, dtype=torch.float32)
    arguments = (case.student_hidden, case.student_head, case.teacher_hidden, case.teacher_head, None)
    settings = {"token_weights": None, "kl_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0, "chunk_tokens": None}
    problem = checked_problem(*arguments, **settings, vocab_group=None, fp32_logits=False)
    monkeypatch.setitem(token_chunks.LOGIT_BYTES, "cpu", 300 * 64 * 4 * 2)
    assert token_chunks.chunk_size(problem, 1000) == 256
    assert token_chunks.chunk_size(problem, 300) == 300
    assert token_chunks.chunk_size(problem, 301) == 160
    monkeypatch.setitem(token_chunks.LOGIT_BYTES, "cpu", 1)
    assert token_chunks.chunk_size(problem, 1000) == 1
