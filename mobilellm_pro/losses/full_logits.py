"""The reference: all logits at once, plain autograd. For tests and small inputs, not for training.

Shape suffixes: T tokens, V vocabulary, D student width, E teacher width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mobilellm_pro.losses.problem import IGNORED_LABEL, Problem


def full_logits_distillation(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss (scalar, differentiable) and [kl, ce, teacher_ce, teacher_entropy], as `linear_distillation` defines them.

    Logits are rounded to the dtype of the inputs, as a model's output layer would, and taken up to fp32 (fp64 stays),
    unless fp32 logits are asked for.
    Extra memory: several times [T, V] fp32.
    """
    # Boolean selection, not multiplication by zero: a NaN in a token of weight 0 must not reach the sum.
    used = problem.kl_weights != 0
    kl_weights_T, ce_weights_T = problem.kl_weights[used], problem.ce_weights[used]
    logits_TV = _logits(problem.student_hidden[used], problem.student_head, problem)
    kl = ce = teacher_ce = teacher_entropy = logits_TV.new_zeros(())
    log_q_TV = F.log_softmax(logits_TV / problem.temperature, dim=-1)
    if problem.labels is not None:
        labels_T = problem.labels[used]
        ce = _cross_entropy(logits_TV, labels_T, ce_weights_T)
    if problem.teacher_hidden is not None and problem.teacher_head is not None:
        teacher_TV = _logits(problem.teacher_hidden[used], problem.teacher_head, problem)
        log_p_TV = F.log_softmax(teacher_TV / problem.temperature, dim=-1)
        kl, teacher_entropy = _divergence(log_p_TV, log_q_TV, kl_weights_T)
        if problem.labels is not None:
            teacher_ce = _cross_entropy(teacher_TV, labels_T, ce_weights_T)
    if problem.teacher_ids is not None and problem.teacher_log_probs is not None:
        log_p_TK, log_q_TK = _merged_tail(problem.teacher_ids[used], problem.teacher_log_probs[used], log_q_TV)
        kl, teacher_entropy = _divergence(log_p_TK, log_q_TK, kl_weights_T)
    kl = problem.temperature**2 * kl
    loss = problem.kl_weight * kl + problem.ce_weight * ce
    return loss, torch.stack([kl, ce, teacher_ce, teacher_entropy])


def _logits(hidden_TD: Tensor, head_VD: Tensor, problem: Problem) -> Tensor:
    if problem.fp32_logits:
        hidden_TD, head_VD = hidden_TD.to(problem.sum_dtype), head_VD.to(problem.sum_dtype)
    return (hidden_TD @ head_VD.T).to(problem.sum_dtype)


def _divergence(log_p: Tensor, log_q: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """KL and the entropy of p, weighted and summed; outcomes with p = 0 count nothing."""
    p, possible = log_p.exp(), ~log_p.isneginf()
    kl_T = (p * torch.where(possible, log_p - log_q, 0)).sum(-1)
    return weights_T @ kl_T, -weights_T @ (p * torch.where(possible, log_p, 0)).sum(-1)


def _merged_tail(ids_TK: Tensor, log_p_TK: Tensor, log_q_TV: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K + 1] log probabilities of teacher and student: the K ids, then all others together."""
    used_TK, index_TK = ids_TK >= 0, ids_TK.clamp_min(0)
    outside_TV = torch.zeros_like(log_q_TV).scatter_add(1, index_TK, used_TK.to(log_q_TV.dtype)) == 0
    has_tail_T = outside_TV.any(-1)
    tail_T = torch.where(has_tail_T, (1 - log_p_TK.exp().sum(-1)).clamp_min(0), 0)
    # A finite stand-in where there is no tail: the gradient of a logsumexp over nothing is not a number.
    log_q_tail_T = torch.where(outside_TV | ~has_tail_T[:, None], log_q_TV, -torch.inf).logsumexp(-1)
    log_q_TK = log_q_TV.gather(1, index_TK)
    return torch.cat([log_p_TK, tail_T.log()[:, None]], 1), torch.cat([log_q_TK, log_q_tail_T[:, None]], 1)


def _cross_entropy(logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    per_token_T = F.cross_entropy(logits_TV, labels_T, reduction="none", ignore_index=IGNORED_LABEL)
    return (weights_T * per_token_T).sum()
