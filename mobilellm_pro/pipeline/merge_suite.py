"""Merged models scored by a suite of lm-eval-harness tasks: `search.objective = "suite"`."""

import tempfile
from pathlib import Path
from typing import Any

from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.suite import load_suite
from mobilellm_pro.evaluation.suite_run import SuiteRun
from mobilellm_pro.evaluation.text_model import StudentModel
from mobilellm_pro.model.student import Student


class SuiteErrors:
    """What is missing to 1 in each column of a suite, so that less is better, as of the other scores."""

    def __init__(self, suite: str, tokenizer: Tokenizer, max_tokens: int) -> None:
        """
        Args:
            suite: TOML file; its documents should be none that a report uses.
            tokenizer: of the models.
            max_tokens: longest row that they were trained on.

        Raises:
            ValueError: the suite cannot be read, or names tasks that nobody knows or whose data is missing.
        """
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._scratch = tempfile.TemporaryDirectory()  # removed with this object
        self._run = SuiteRun(load_suite(suite), suite, Path(self._scratch.name))
        self._run.check_data(max_tokens)

    def __call__(self, model: Student, text: Any) -> dict[str, float]:
        """Of each column; the text of the domains is not read."""
        text_model = StudentModel(model, self._max_tokens)
        folder = Path(self._scratch.name) / "merged"
        results = self._run.evaluate_in_memory(text_model, self._tokenizer, folder, "merged")
        return {task: 1 - column["score"] for task, column in results["columns"].items()}
