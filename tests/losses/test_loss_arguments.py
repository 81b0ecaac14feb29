"""What a caller can get wrong is refused by name before any product is computed.

Shape suffixes: T tokens, V vocabulary, D student width, E teacher width.
"""

import pytest
import torch

from mobilellm_pro.losses import linear_distillation

GOOD = {
    "student_hidden": torch.zeros(4, 3),
    "student_head": torch.zeros(9, 3),
    "teacher_hidden": torch.zeros(4, 5),
    "teacher_head": torch.zeros(9, 5),
    "labels": torch.zeros(4, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("student_hidden", torch.zeros(4, 2), r"student_hidden, student_head: expected .* got \[4, 2\]"),
        ("student_hidden", torch.zeros(4, 3).half(), "bfloat16, float32 or float64, got torch.float16"),
        ("student_head", torch.zeros(9, 3).bfloat16(), "student_head dtype: expected torch.float32"),
        ("student_head", torch.zeros(0, 3), "student_hidden, student_head"),
        ("student_head", torch.zeros(9, 3, device="meta"), "student_head device: expected cpu"),
        ("teacher_hidden", None, "both or neither"),
        ("teacher_hidden", torch.zeros(5, 5), r"teacher_hidden leading dimensions: expected \(4,\)"),
        ("teacher_head", torch.zeros(8, 5), r"teacher_head rows \(vocabulary\): expected 9, got 8"),
        ("labels", torch.zeros(5, dtype=torch.int64), r"labels shape: expected \(4,\)"),
        ("labels", torch.zeros(4), "labels dtype: expected torch.int64"),
        ("labels", torch.full((4,), 9), r"labels: expected -100 or an id in \[0, 9\), got 9"),
        ("labels", torch.full((4,), -1), "got -1"),
        ("token_weights", torch.ones(3), r"token_weights shape: expected \(4,\)"),
        ("temperature", 0.0, "temperature: expected a finite number above 0"),
        ("temperature", float("nan"), "temperature"),
        ("kl_weight", -1.0, "kl_weight: expected a finite number of at least 0"),
        ("ce_weight", float("inf"), "ce_weight"),
        ("chunk_tokens", 0, "chunk_tokens: expected at least 1"),
        ("impl", "fast", "impl: expected one of auto, torch, chunked"),
        ("vocab_group", "tp", "vocab_group: expected"),
    ],
)
def test_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        linear_distillation(**{**GOOD, name: value})


def test_weights_without_their_inputs():
    with pytest.raises(ValueError, match="kl_weight: expected 0 without a teacher"):
        linear_distillation(GOOD["student_hidden"], GOOD["student_head"])
    with pytest.raises(ValueError, match="ce_weight: expected 0 without labels"):
        linear_distillation(GOOD["student_hidden"], GOOD["student_head"], kl_weight=0.0, ce_weight=1.0)
