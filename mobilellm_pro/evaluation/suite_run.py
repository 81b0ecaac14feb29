"""A suite's tasks, run by lm-eval-harness one after another: of a checkpoint, or of a student in memory."""

import contextlib
import importlib.metadata
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.evaluation_folder import write_results, write_task
from mobilellm_pro.evaluation.local_datasets import local_datasets
from mobilellm_pro.evaluation.ranks import rank, wait_for_ranks
from mobilellm_pro.evaluation.suite import DEFAULT_NEW_TOKENS, NEEDLE, Column, Suite
from mobilellm_pro.evaluation.text_model import TextModel

if TYPE_CHECKING:
    from mobilellm_pro.evaluation.harness_model import HarnessModel

OWN_TASKS = Path(__file__).parent / "tasks"
"""Definitions of tasks that the harness lacks."""

_BOOTSTRAP = 1000
"""Draws for the standard error of a metric that is no mean."""

_SANDBOXED = "_sandboxed"
"""How tasks end whose programs run in a subprocess with limits."""


class SuiteRun:
    """A suite, with lm-eval's tasks and this project's; to make one takes seconds, since all definitions are read."""

    def __init__(self, suite: Suite, source: str, folder: Path, *, allow_code: bool = False) -> None:
        """Looks for all of a suite's tasks, without any data.

        Args:
            suite: that will be run.
            source: its file.
            folder: where tasks that count tokens will find the tokenizer.
            allow_code: whether programs that the model writes may be run.

        Raises:
            ValueError: tasks that nobody knows, or that run code although that is not allowed.
        """
        from lm_eval.tasks import TaskManager

        self._suite, self._source, self._allow_code = suite, source, allow_code
        self._tokenizer = folder / "tokenizer"
        metadata = {"max_seq_lengths": suite.ruler.lengths, "tokenizer": str(self._tokenizer)}
        self._manager = TaskManager(include_path=str(OWN_TASKS), metadata=metadata)
        self._check_names()

    def _check_names(self) -> None:
        tasks = [column.task for column in self._suite.columns if column.task != NEEDLE]
        unknown = [task for task in tasks if task not in self._manager.all_tasks]
        if unknown:
            raise ValueError(
                f"{self._source}: task {', '.join(unknown)}: lm-eval {importlib.metadata.version('lm-eval')} has none "
                "of that name, nor has this project; see `lm_eval ls tasks`"
            )
        outside = [task for task in tasks if task.startswith(("humaneval", "mbpp")) and not task.endswith(_SANDBOXED)]
        if outside:
            raise ValueError(
                f"{self._source}: {', '.join(outside)} would run programs without limits; this project's end with "
                f"{_SANDBOXED}"
            )
        running = [task for task in tasks if task.endswith(_SANDBOXED)]
        if running and not self._allow_code:
            raise ValueError(
                f"{self._source}: {', '.join(running)} run programs that the model writes, in a subprocess with limits "
                "but on this machine; say --allow-code, or leave them out with --only"
            )

    def check_data(self, max_length: int) -> None:
        """Loads all tasks before the first one is run; RULER's only then, since they make their data first.

        Args:
            max_length: tokens of the model's longest sequence.

        Raises:
            ValueError: data is missing, prompts or answers are longer than the model's sequences, or a task of others
                runs programs.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        source, needle = self._source, self._suite.needle
        length, tasks = self._suite.max_length or max_length, [column.task for column in self._suite.columns]
        if NEEDLE in tasks and max(needle.lengths) > length:
            raise ValueError(
                f"{source}: needle.lengths: {max(needle.lengths)} tokens for a model of {length}; give shorter ones"
            )
        with local_datasets(self._suite.data):
            for task in (task for task in tasks if task != NEEDLE and not _is_ruler(task)):
                for name, loaded in self._manager.load(task)["tasks"].items():
                    if getattr(loaded, "UNSAFE_CODE", False) and not name.endswith(_SANDBOXED):
                        raise ValueError(f"{source}: {name} would run programs without limits; leave it out")
                    if loaded.OUTPUT_TYPE != "generate_until":
                        continue
                    settings = normalize_gen_kwargs(dict(loaded.config.generation_kwargs or {}), DEFAULT_NEW_TOKENS)
                    if (new_tokens := settings["max_gen_toks"]) >= length:
                        raise ValueError(
                            f"{source}: {name} asks for {new_tokens} new tokens of a model of {length}; leave it out, "
                            "or give a larger max_length"
                        )

    def evaluate(
        self, columns: Sequence[Column], model: "HarnessModel", folder: Path, *, answers: Path | None = None
    ) -> None:
        """Evaluates tasks one after another, and writes each when it is finished; a collective of the model's ranks.

        Args:
            columns: of the suite.
            model: to evaluate.
            folder: to write to, on the first rank.
            answers: folder where the answers of a task are kept until all are finished, so that one that was stopped
                goes on; None: nothing is kept.
        """
        if any(_is_ruler(column.task) for column in columns):
            model.write_tokenizer(self._tokenizer)
        for number, column in enumerate(columns):
            if rank() == 0:
                print(f"{column.task}: {number + 1} of {len(columns)}", flush=True)
            if column.task == NEEDLE:
                scores, samples = model.needle(self._suite.needle, column.metric)
            else:
                found = self._harness_task(column, model, answers)
                if found is None:  # on all but the first rank of each node
                    continue
                scores = {key: found[key] for key in ("results", "n-shot", "n-samples", "versions")}
                samples = found["samples"]
            if rank() == 0:
                write_task(folder, column, scores, samples)
        if answers and rank() == 0:
            shutil.rmtree(answers, ignore_errors=True)

    def _harness_task(self, column: Column, model: "HarnessModel", answers: Path | None) -> dict[str, Any] | None:
        from lm_eval import simple_evaluate

        seed = self._suite.seed
        with local_datasets(self._suite.data):
            return simple_evaluate(
                model=model,
                tasks=[column.task],
                num_fewshot=column.shots,
                limit=self._suite.limit or None,
                use_cache=str(answers / column.task) if answers else None,
                bootstrap_iters=_BOOTSTRAP,
                apply_chat_template=self._suite.chat,
                task_manager=self._manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                confirm_run_unsafe_code=self._allow_code,
            )

    def evaluate_in_memory(self, model: TextModel, tokenizer: Tokenizer, folder: Path, name: str) -> dict[str, Any]:
        """Evaluates a model that is in memory, without a word on standard output; a collective of the model's ranks.

        Args:
            model: whole on every rank.
            tokenizer: the model's.
            folder: to write to, on the first rank; what is there is removed.
            name: of the model, in the results.

        Returns:
            What results.json holds; on other ranks than the first nothing.
        """
        from mobilellm_pro.evaluation.harness_model import HarnessModel

        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        wait_for_ranks()
        with contextlib.redirect_stdout(io.StringIO()):
            adapter = HarnessModel(model, tokenizer, self._suite.max_length)
            self.evaluate(self._suite.columns, adapter, folder)
        if rank():
            return {}
        about = {"suite": self._suite.name, "checkpoint": name, "limit": self._suite.limit or None}
        return write_results(folder, self._suite, about)


def _is_ruler(task: str) -> bool:
    return task.startswith("niah")
