"""The distillation loss in ten lines of fp64, what plain torch makes of it in the tested dtype, and random inputs.

Tests compare with `definition`; the benchmark imports `plain_torch`, so that the two cannot drift apart.

Shape suffixes: T tokens, V vocabulary, D student width, E teacher width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Case:
    """Inputs of a loss: [T, D], [V, D], [T, E], [V, E], labels [T], weights [T]."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    weights: Tensor
    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0

    def to(self, dtype: torch.dtype) -> "Case":
        names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "weights")
        return replace(self, **{name: getattr(self, name).detach().to(dtype) for name in names})

    def leaves(self) -> "Case":
        student = {n: getattr(self, n).detach().clone().requires_grad_() for n in ("student_hidden", "student_head")}
        return replace(self, **student)


def definition(case: Case) -> Tensor:
    """[kl, ce, teacher_ce, teacher_entropy] in fp64; a label of -100 has no cross entropy."""
    z = case.student_hidden.double() @ case.student_head.double().T
    y = case.teacher_hidden.double() @ case.teacher_head.double().T
    log_q, log_p = (z / case.temperature).log_softmax(-1), (y / case.temperature).log_softmax(-1)
    w, t = case.weights.double(), case.temperature
    labelled, index = case.labels >= 0, case.labels.clamp_min(0)[:, None]
    ce = [-(w * labelled * x.log_softmax(-1).gather(1, index)[:, 0]).sum() for x in (z, y)]
    kl = t * t * (w * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
    return torch.stack([kl, *ce, -(w * (log_p.exp() * log_p).sum(-1)).sum()])


def truth(case: Case, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Definition's terms and the gradients of hidden states and head, fp64, from the inputs as they are rounded."""
    exact = case.to(torch.float64).leaves()
    terms = definition(exact)
    loss = exact.kl_weight * terms[0] + exact.ce_weight * terms[1]
    return terms.detach(), *torch.autograd.grad(upstream * loss, (exact.student_hidden, exact.student_head))


def plain_torch(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, weights: Tensor
) -> Tensor:
    """Forward KL as one would write it: two output layers, two log-softmaxes in fp32, `F.kl_div`."""
    log_q_TV = F.log_softmax((student_hidden @ student_head.T).float(), dim=-1)
    with torch.no_grad():
        log_p_TV = F.log_softmax((teacher_hidden @ teacher_head.T).float(), dim=-1)
    return (weights * F.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1)).sum()


def random_case(
    tokens: int,
    vocabulary: int,
    student_width: int,
    teacher_width: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    logit_scale: float = 2.0,
    zero_weights: float = 0.3,
    ignored: float = 0.2,
    **settings: float,
) -> Case:
    """Random inputs whose logits have standard deviation `logit_scale`; some weights 0, some labels ignored."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(vocabulary, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < ignored] = -100
    weights = torch.rand(tokens, generator=g, dtype=torch.float64) + 0.5
    weights[torch.rand(tokens, generator=g) < zero_weights] = 0
    case = Case(
        student_hidden=normal(tokens, student_width),
        student_head=normal(vocabulary, student_width) * logit_scale / student_width**0.5,
        teacher_hidden=normal(tokens, teacher_width),
        teacher_head=normal(vocabulary, teacher_width) * logit_scale / teacher_width**0.5,
        labels=labels,
        weights=weights,
    )
    return replace(case.to(dtype), weights=weights.to(torch.promote_types(dtype, torch.float32)), **settings)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected (over 1 where that is 0)."""
    scale = expected.double().norm().item() or 1.0
    return ((got.double() - expected.double()).norm() / scale).item()
