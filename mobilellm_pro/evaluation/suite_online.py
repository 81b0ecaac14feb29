"""A suite of lm-eval-harness tasks at an interval of training: what [evaluation] of a job asks for.

Every rank holds the whole student and answers its share of the documents. The run's folder gets, under eval/step-N,
what `evaluate` writes.
"""

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from mobilellm_pro.config.job_config import Evaluation
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.evaluation_folder import DONE
from mobilellm_pro.evaluation.ranks import gathered
from mobilellm_pro.evaluation.suite import load_suite
from mobilellm_pro.evaluation.suite_run import SuiteRun
from mobilellm_pro.evaluation.text_model import StudentModel
from mobilellm_pro.model.student import Student


class OnlineSuite:
    """An evaluation for `mobilellm_pro.training.online_evaluation`."""

    name = "eval"

    def __init__(self, settings: Evaluation, tokenizer: str, max_tokens: int, run_folder: Path) -> None:
        """Reads nothing yet.

        Args:
            settings: the [evaluation] section.
            tokenizer: source for `Tokenizer.load`, the run's.
            max_tokens: longest row of the run.
            run_folder: gets the folder eval/.
        """
        self.freq = settings.freq
        self._file, self._tokenizer, self._max_tokens = settings.suite, tokenizer, max_tokens
        self._folder = run_folder / self.name

    @cached_property
    def _run(self) -> SuiteRun:
        return SuiteRun(load_suite(self._file), self._file, self._folder)

    def problems(self) -> list[str]:
        """A suite that cannot be read, tasks that nobody knows or that run code, data that is not there."""
        if find_spec("lm_eval") is None:
            return ["evaluation.suite needs lm-eval: pip install 'mobilellm-pro[eval]', or leave the key empty"]
        try:
            self._run.check_data(self._max_tokens)
        except (ValueError, OSError) as error:
            return [f"[evaluation]: {error}"]
        return []

    def is_done(self, step: int) -> bool:
        """Whether the scores of this step are in the run's folder."""
        return (self._folder / f"step-{step}" / DONE).is_file()

    def __call__(self, model: Student, step: int) -> dict[str, float]:
        """Tests a whole student, on every rank at once.

        Returns:
            score of each column and each average, in percent.
        """
        text_model = StudentModel(model, self._max_tokens)
        tokenizer, folder = Tokenizer.load(self._tokenizer), self._folder / f"step-{step}"
        results = self._run.evaluate_in_memory(text_model, tokenizer, folder, f"step {step}")
        scores = {
            name: 100 * one["score"] for part in ("columns", "averages") for name, one in results.get(part, {}).items()
        }
        return gathered({0: scores} if results else {})[0]
