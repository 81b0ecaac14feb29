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
from mobilellm_pro.evaluation.suite import NEEDLE, Column, Suite
from mobilellm_pro.evaluation.text_model import TextModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from mobilellm_pro.evaluation.harness_model import HarnessModel

OWN_TASKS = Path(__file__).parent / "tasks"
"""Definitions of tasks that the harness lacks."""

DEFAULT_NEW_TOKENS = 256
"""Of a continuation whose task does not say how long it may be; the harness' own."""

_TOKENIZER = "tokenizer"
_BOOTSTRAP = 1000
"""Draws for the standard error of a metric that is no mean."""


def check_names(suite: Suite, source: str, known: Sequence[str], *, allow_code: bool) -> None:
    """Looks for all of a suite's tasks, without any data.

    Args:
        suite: that will be run.
        source: its file.
        known: names of tasks.
        allow_code: whether programs that the model writes may be run.

    Raises:
        ValueError: tasks that nobody knows, or that run code although that is not allowed.
    """
    tasks = [column.task for column in suite.columns if column.task != NEEDLE]
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(
            f"{source}: task {', '.join(unknown)}: lm-eval {importlib.metadata.version('lm-eval')} has none of that "
            "name, nor has this project; see `lm_eval ls tasks`"
        )
    outside = [task for task in tasks if task.startswith(("humaneval", "mbpp")) and not task.endswith("_sandboxed")]
    if outside:
        names = ", ".join(outside)
        raise ValueError(f"{source}: {names} would run programs without limits; this project's end with _sandboxed")
    running = [task for task in tasks if task.endswith("_sandboxed")]
    if running and not allow_code:
        raise ValueError(
            f"{source}: {', '.join(running)} run programs that the model writes, in a subprocess with limits but on "
            "this machine; say --allow-code, or leave them out with --only"
        )


def check_data(suite: Suite, source: str, manager: "TaskManager", max_length: int) -> None:
    """Loads all of a suite's tasks before the first one is run; RULER's only then, since they make their data first.

    Args:
        suite: that will be run.
        source: its file.
        manager: from `task_manager`.
        max_length: tokens of the model's longest sequence.

    Raises:
        ValueError: data is missing, prompts or answers are longer than the model's sequences, or a task of others runs
            programs.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    length, tasks = suite.max_length or max_length, [column.task for column in suite.columns]
    if NEEDLE in tasks and max(suite.needle.lengths) > length:
        raise ValueError(
            f"{source}: needle.lengths: {max(suite.needle.lengths)} tokens for a model of {length}; give shorter ones"
        )
    with local_datasets(suite.data):
        for task in (task for task in tasks if task != NEEDLE and not task.startswith("niah")):
            for name, loaded in manager.load(task)["tasks"].items():
                if getattr(loaded, "UNSAFE_CODE", False) and not name.endswith("_sandboxed"):
                    raise ValueError(f"{source}: {name} would run programs without limits; leave it out")
                if loaded.OUTPUT_TYPE != "generate_until":
                    continue
                settings = normalize_gen_kwargs(dict(loaded.config.generation_kwargs or {}), DEFAULT_NEW_TOKENS)
                if (new_tokens := settings["max_gen_toks"]) >= length:
                    raise ValueError(
                        f"{source}: {name} asks for {new_tokens} new tokens of a model of {length}; leave it out, or "
                        "give a larger max_length"
                    )


def task_manager(suite: Suite, folder: Path) -> "TaskManager":
    """lm-eval's, with this project's tasks; it reads every definition that it has, which takes seconds.

    Args:
        suite: whose tasks will be asked for.
        folder: of the evaluation, where tasks that count tokens will find the tokenizer.
    """
    from lm_eval.tasks import TaskManager

    metadata = {"max_seq_lengths": suite.ruler.lengths, "tokenizer": str(folder / _TOKENIZER)}
    return TaskManager(include_path=str(OWN_TASKS), metadata=metadata)


def evaluate_columns(
    suite: Suite,
    columns: Sequence[Column],
    model: "HarnessModel",
    manager: "TaskManager",
    folder: Path,
    *,
    allow_code: bool = False,
    answers: Path | None = None,
) -> None:
    """Evaluates tasks one after another, and writes each as soon as it is finished; a collective of the model's ranks.

    Args:
        suite: with its settings.
        columns: of the suite.
        model: to evaluate.
        manager: from `task_manager`.
        folder: to write to, on the first rank.
        allow_code: run programs that the model writes.
        answers: folder where the answers of a task are kept until all are finished, so that one that was stopped goes
            on; None: nothing is kept.
    """
    from lm_eval import simple_evaluate

    if any(column.task.startswith("niah") for column in columns):
        model.write_tokenizer(Path((manager.metadata or {})["tokenizer"]))
    for number, column in enumerate(columns):
        if rank() == 0:
            print(f"{column.task}: {number + 1} of {len(columns)}", flush=True)
        if column.task == NEEDLE:
            scores, samples = model.needle(suite.needle, column.metric)
        else:
            with local_datasets(suite.data):
                found = simple_evaluate(
                    model=model,
                    tasks=[column.task],
                    num_fewshot=column.shots,
                    limit=suite.limit or None,
                    use_cache=str(answers / column.task) if answers else None,
                    bootstrap_iters=_BOOTSTRAP,
                    apply_chat_template=suite.chat,
                    task_manager=manager,
                    random_seed=suite.seed,
                    numpy_random_seed=suite.seed,
                    torch_random_seed=suite.seed,
                    fewshot_random_seed=suite.seed,
                    confirm_run_unsafe_code=allow_code,
                )
            if found is None:  # on all but the first rank of each node
                continue
            scores = {key: found[key] for key in ("results", "n-shot", "n-samples", "versions")}
            samples = found["samples"]
        if rank() == 0:
            write_task(folder, column, scores, samples)
    if answers and rank() == 0:
        shutil.rmtree(answers, ignore_errors=True)


def evaluate_in_memory(
    suite: Suite, model: TextModel, tokenizer: Tokenizer, manager: "TaskManager", folder: Path, name: str
) -> dict[str, Any]:
    """Evaluates a model that is in memory, without a word on standard output; a collective of the model's ranks.

    Args:
        suite: whose tasks run no programs.
        model: whole on every rank.
        tokenizer: the model's.
        manager: from `task_manager`.
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
        adapter = HarnessModel(model, tokenizer, suite.max_length)
        evaluate_columns(suite, suite.columns, adapter, manager, folder)
    if rank():
        return {}
    return write_results(folder, suite, {"suite": suite.name, "checkpoint": name, "limit": suite.limit or None})
