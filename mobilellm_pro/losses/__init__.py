"""Losses over the vocabulary, fused with the output heads: tensors in, a sum over tokens out.

The definition has one home, `linear_forward_kl.py`; the other files are ways to compute it. Nothing here knows a
configuration, a mesh or a trainer, so every function can be called from a notebook on plain tensors.
"""

from mobilellm_pro.losses.linear_forward_kl import (
    DistillationLoss,
    linear_cross_entropy,
    linear_distillation,
    linear_forward_kl,
    linear_top_k_distillation,
)
from mobilellm_pro.losses.non_finite import non_finite_reports

__all__ = [
    "DistillationLoss",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_forward_kl",
    "linear_top_k_distillation",
    "non_finite_reports",
]
