"""The needle test as a task of a suite: its scores and documents in the form of lm-eval's results."""

import hashlib
import math
from typing import Any

from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.needle import needle_score
from mobilellm_pro.evaluation.needle_grid import Grid, check_prompts
from mobilellm_pro.evaluation.needle_haystack import open_haystack
from mobilellm_pro.evaluation.needle_prompt import TEMPLATE_VERSION
from mobilellm_pro.evaluation.suite import NEEDLE, NeedleTable
from mobilellm_pro.model.student import Student


def needle_task(
    student: Student, tokenizer: Tokenizer, settings: NeedleTable, metric: str
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Runs the test; a collective of all ranks.

    Args:
        student: whole on every rank.
        tokenizer: the student's.
        settings: grid and text.
        metric: what the share of cells found is called.

    Returns:
        scores and documents, as lm-eval has them.

    Raises:
        ValueError: a prompt is too short for its question.
    """
    grid = Grid.of(settings)
    haystack = open_haystack(settings.haystack or None, tokenizer)
    check_prompts(grid, haystack, tokenizer)
    found = needle_score(student, tokenizer, grid=grid, haystack=haystack, batch=settings.batch)
    share = found["correct"] / found["total"]
    error = math.sqrt(share * (1 - share) / max(1, found["total"] - 1))
    scores = {
        "results": {NEEDLE: {f"{metric},none": share, f"{metric}_stderr,none": error}},
        "n-shot": {NEEDLE: 0},
        "n-samples": {NEEDLE: {"original": found["total"], "effective": found["total"]}},
        "versions": {NEEDLE: TEMPLATE_VERSION},
    }
    documents = [
        {
            "filter": "none",
            "doc_id": number,
            "doc_hash": hashlib.sha256(f"{haystack.identity} {cell}".encode()).hexdigest(),
            "doc": {},
            "target": cell["value"],
            "filtered_resps": [cell["answer"]],
            metric: cell["correct"],
        }
        for number, cell in enumerate(found["cells"])
    ]
    return scores, {NEEDLE: documents}
