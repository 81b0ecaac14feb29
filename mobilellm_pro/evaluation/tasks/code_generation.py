"""HumanEval (Chen et al., 2021) and MBPP (Austin et al., 2021): programs that models write, run within limits.

lm-eval's own tasks fetch their metric from a network when they are loaded; these run `code_execution.run_program`, and
their YAML files say `unsafe_code: true`, so that lm-eval refuses them unless the user allowed running code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from mobilellm_pro.evaluation.code_execution import run_program

MBPP_EXAMPLES = (2, 3, 4)
"""task_id of the three solved problems before each question, as in the paper."""


def score_humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """pass_at_1 of a continuation of the prompt."""
    return _passes(f"{doc['prompt']}{results[0]}\n{_humaneval_check(doc)}")


def score_humaneval_instruct(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """pass_at_1 of an answer that begins within a fence, after the prompt."""
    return _passes(f"{doc['prompt']}\n{_up_to_fence(results[0])}\n{_humaneval_check(doc)}")


def score_mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """pass_at_1 of a whole program."""
    return _passes(_mbpp_program(doc, results[0].split("[DONE]")[0]))


def score_mbpp_instruct(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """pass_at_1 of an answer that begins within a fence."""
    return _passes(_mbpp_program(doc, _up_to_fence(results[0])))


def mbpp_examples(split: Dataset) -> list[dict[str, Any]]:
    """The solved problems of the data's split "prompt", in the order of MBPP_EXAMPLES.

    Raises:
        ValueError: the split lacks one of them.
    """
    by_id = {row["task_id"]: row for row in split}
    missing = [number for number in MBPP_EXAMPLES if number not in by_id]
    if missing:
        raise ValueError(
            f"MBPP: the split 'prompt' has no task_id {missing}, only {sorted(by_id)}; expected the files of "
            "google-research-datasets/mbpp, configuration 'full'"
        )
    return [by_id[number] for number in MBPP_EXAMPLES]


def _humaneval_check(doc: Mapping[str, Any]) -> str:
    return f"{doc['test']}\ncheck({doc['entry_point']})\n"


def _mbpp_program(doc: Mapping[str, Any], code: str) -> str:
    return "\n".join([code, doc["test_setup_code"], *doc["test_list"]])


def _up_to_fence(answer: str) -> str:
    """The code of an answer whose opening fence is part of the prompt; a fence that is opened again is left out."""
    lines = answer.split("\n")
    if lines[0].startswith("```"):
        lines = lines[1:]
    return "\n".join(lines).split("```")[0]


def _passes(program: str) -> dict[str, float]:
    return {"pass_at_1": float(run_program(program).passed)}
