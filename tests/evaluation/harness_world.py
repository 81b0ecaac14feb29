"""What tests of lm-eval share: a student whose predictions depend on all that it sees, and few task definitions."""

from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from mobilellm_pro.convert.conversion import write_tokenizer
from mobilellm_pro.data.tokenizer import Tokenizer
from tests.data.synthetic import DEBUG_TOKENIZER
from tests.evaluation.test_needle import write_student

_TASKS = Path(lm_eval.__file__).parent / "tasks"
_FOLDERS = {"boolq": "super_glue/boolq", "social_iqa": "siqa", "niah_single_1": "ruler"}


def write_sharp_student(folder: Path) -> Path:
    """A debug student with large weights and its tokenizer, as a Hugging Face folder."""
    write_student(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: 5 * w if w.ndim > 1 else w for name, w in weights.items()}, folder / "model.safetensors")
    write_tokenizer(Tokenizer.load(str(DEBUG_TOKENIZER)), folder, max_tokens=400)
    return folder


def task_folder(task: str) -> str:
    """Where lm-eval defines a task."""
    return str(_TASKS / _FOLDERS.get(task, task))


def few_tasks(*tasks: str, include_path: str | None = None, metadata: dict[str, Any] | None = None) -> TaskManager:
    """A task manager that reads few files; lm-eval has ten thousand.

    Args:
        tasks: of lm-eval.
        include_path: a folder of more definitions.
        metadata: settings of tasks that make their own data.
    """
    folders = [task_folder(task) for task in tasks] + ([include_path] if include_path else [])
    return TaskManager(include_defaults=False, include_path=folders, metadata=metadata)
