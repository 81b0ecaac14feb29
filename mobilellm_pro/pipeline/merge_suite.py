"""Merged models scored by a suite of lm-eval-harness tasks: `search.objective = "suite"`."""

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.evaluate import check_tasks, evaluate_columns, task_manager
from mobilellm_pro.evaluation.evaluation_folder import write_results
from mobilellm_pro.evaluation.suite import load_suite
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
            ValueError: the suite cannot be read, or names tasks that nobody knows.
        """
        self._suite, self._tokenizer, self._max_tokens = load_suite(suite), tokenizer, max_tokens
        self._folder = Path(tempfile.mkdtemp())
        self._manager = task_manager(self._suite, self._folder)
        check_tasks(self._suite, suite, self._manager.all_tasks, allow_code=False)

    def __call__(self, model: Student, text: Any) -> dict[str, float]:
        """Of each column; the text of the domains is not read."""
        from mobilellm_pro.evaluation.harness_model import HarnessModel

        adapter = HarnessModel(StudentModel(model, self._max_tokens), self._tokenizer, self._suite.max_length)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            evaluate_columns(self._suite, self._suite.columns, adapter, self._manager, Path(folder))
            record = {"suite": self._suite.name, "checkpoint": "merged", "limit": self._suite.limit or None}
            columns = write_results(Path(folder), self._suite, record)["columns"]
        return {task: 1 - column["score"] for task, column in columns.items()}
