"""What a run needs on its disk, and what is free there."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from torchtitan.config import TORCH_DTYPE_MAP

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.data.hidden_state_files import existing_parent
from mobilellm_pro.model.registry import model_on_meta

_MOMENTS = 2  # of Adam and AdamW, in the data type of the weights


def free_bytes(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    return shutil.disk_usage(existing_parent(folder)).free


def in_words(num_bytes: int) -> str:
    """Bytes as GB (1e9) or MB (1e6)."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.3f} MB"


def checkpoint_bytes(config: JobConfig) -> int:
    """Bytes of the largest checkpoint of a run: weights and, unless only a last one without it is saved, optimizer.

    Raises:
        ValueError: the configured model is unknown.
    """
    numel = sum(parameter.numel() for parameter in model_on_meta(config).parameters())
    checkpoint = config.checkpoint
    only_last = checkpoint.interval >= config.training.steps and not checkpoint.enable_first_step_checkpoint
    if checkpoint.last_save_model_only and only_last:
        return numel * TORCH_DTYPE_MAP[checkpoint.export_dtype].itemsize
    return numel * TORCH_DTYPE_MAP[config.training.dtype].itemsize * (1 + _MOMENTS)


def checkpoint_room_problems(config: JobConfig) -> Iterator[str]:
    """Whether one more checkpoint fits: `keep_latest_k` removes an old one only after the new one is complete."""
    folder = Path(config.job.dump_folder) / config.checkpoint.folder
    torn = sum(_folder_bytes(step) for step in folder.glob("step-*") if not (step / ".metadata").is_file())
    needed, free = checkpoint_bytes(config), torn + free_bytes(folder)  # a start removes what is torn
    if needed > free:
        yield (
            f"{folder}: a checkpoint of this run takes {in_words(needed)}, {in_words(free)} are free on that disk: "
            "free space, or choose another job.dump_folder"
        )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            pass  # another rank removes the folder
    return total
