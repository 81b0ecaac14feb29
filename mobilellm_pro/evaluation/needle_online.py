"""The needle test at an interval of training: what [needle] of a job asks for.

Every rank holds the whole student and runs its share of the cells; the score is that of one rank running them all. The
cells of each test are in the run's folder, needle/step-N.json.
"""

from functools import cached_property
from pathlib import Path

import torch.distributed as dist

from mobilellm_pro.config.job_config import Needle
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.needle import needle_score
from mobilellm_pro.evaluation.needle_grid import Grid, check_prompts
from mobilellm_pro.evaluation.needle_haystack import Haystack, open_haystack
from mobilellm_pro.evaluation.needle_results import write_result
from mobilellm_pro.model.student import Student


class OnlineNeedle:
    """An evaluation for `mobilellm_pro.training.online_evaluation`."""

    name = "needle"

    def __init__(self, settings: Needle, tokenizer: str, run_folder: Path) -> None:
        """Reads nothing yet.

        Args:
            settings: the [needle] section.
            tokenizer: source for `Tokenizer.load`, the run's.
            run_folder: gets the folder needle/.
        """
        self.freq = settings.freq
        self._settings, self._tokenizer_source = settings, tokenizer
        self._folder = run_folder / "needle"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's."""
        return Tokenizer.load(self._tokenizer_source)

    @cached_property
    def haystack(self) -> Haystack:
        """The corpus of the settings, or the filler."""
        return open_haystack(self._settings.haystack or None, self.tokenizer)

    @property
    def grid(self) -> Grid:
        """The cells."""
        return Grid.of(self._settings)

    def problems(self) -> list[str]:
        """A haystack that is not there, of another tokenizer or too small; lengths that do not hold the question."""
        try:
            tokenizer = self.tokenizer
        except (ValueError, OSError):
            return []  # every job is checked for its tokenizer
        try:
            check_prompts(self.grid, self.haystack, tokenizer)
        except (ValueError, OSError) as error:
            return [f"[needle]: {error}"]
        return []

    def is_done(self, step: int) -> bool:
        """Whether the cells of this step are in the run's folder."""
        return (self._folder / f"step-{step}.json").is_file()

    def __call__(self, model: Student, step: int) -> dict[str, float]:
        """Tests a whole student, on every rank at once.

        Returns:
            score, and length_N for every length N, in percent.
        """
        scores = needle_score(model, self.tokenizer, grid=self.grid, haystack=self.haystack, batch=self._settings.batch)
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            record = {"step": step, "haystack": self.haystack.identity, **scores}
            write_result(self._folder, record, f"step-{step}.json")
        by_length = zip(scores["lengths"], scores["by_length"], strict=True)
        return {"score": scores["score"], **{f"length_{length}": percent for length, percent in by_length}}
