"""Finding, checking and reading checkpoints: DCP folders of a run, and Hugging Face folders.

A DCP checkpoint has tensors but no architecture; the run's config.toml, two folders up, has it.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.model import ModelProtocol

from mobilellm_pro.config import JobConfig, load
from mobilellm_pro.model.hugging_face import read_config, student_args, teacher_args
from mobilellm_pro.model.quantized_modules import is_range
from mobilellm_pro.model.registry import configured_args, model_on_meta
from mobilellm_pro.model.shard_loading import load_tensors
from mobilellm_pro.model.student import Student, StudentArgs
from mobilellm_pro.model.teacher import Teacher, TeacherArgs


class RunCheckpoint(NamedTuple):
    """A DCP checkpoint and the configuration of the run that wrote it."""

    config: JobConfig
    step: Path
    """The folder `step-N`."""


class LoadedModel(NamedTuple):
    """A model in memory and where its tokenizer is."""

    model: ModelProtocol
    tokenizer: str
    """Source for `Tokenizer.load`."""

    max_tokens: int
    """Longest row that it was trained on, or its config.json's max_position_embeddings."""


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete DCP checkpoint `step-N`; its metadata is written last, so a torn one has none."""
    complete = [path for path in folder.glob("step-*") if (path / ".metadata").is_file()]
    return max(complete, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def checkpoint_problems(model: nn.Module, folder: Path, *, resume: bool = False, begins: bool = False) -> list[str]:
    """What keeps a DCP checkpoint from filling the model: missing and wrongly shaped tensors.

    Args:
        model: on the meta device.
        folder: of the checkpoint.
        resume: also what keeps a run from going on from it: a model without its optimizer.
        begins: a run begins with it: learned ranges of weights need not be there.
    """
    if not (folder / ".metadata").is_file():
        return [f"{folder}: no complete DCP checkpoint (.metadata is missing); expected a folder step-N of a run"]
    try:
        stored = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle: anything can come out of a damaged one
        return [f"{folder}/.metadata cannot be read ({error}); remove the folder to go on from the one before it"]
    found = []
    for name, parameter in model.named_parameters():
        size = getattr(stored.get(name), "size", None)
        if size is None and begins and is_range(name):
            continue  # it begins at the range of its weight
        if size is None:
            found.append(f"{folder}: parameter {name} is missing")
        elif tuple(size) != tuple(parameter.shape):
            found.append(f"{folder}: parameter {name} has shape {list(size)}, expected {list(parameter.shape)}")
    if found:
        found.append(f"{folder}: this is a checkpoint of another model or flavor; use its own flavor or another folder")
    elif resume and not any(name.startswith("optimizer.") for name in stored):
        found.append(
            f"{folder}: holds the model only, so the run cannot go on from it "
            "(checkpoint.last_save_model_only was true): start another job.dump_folder with "
            "checkpoint.initial_load_path, or remove this step"
        )
    return found


def find_checkpoint(source: str | Path) -> RunCheckpoint:
    """The DCP checkpoint that a folder means: the newest of a run folder, or one `step-N`; with its run's config.toml.

    Raises:
        FileNotFoundError: it is neither, or holds no complete checkpoint.
    """
    source = Path(source)
    run = next((folder for folder in (source, *source.parents) if (folder / "config.toml").is_file()), None)
    config = None if run is None else load(run / "config.toml")
    step: Path | None = source
    if config is not None and run == source:
        step = latest_checkpoint(run / config.checkpoint.folder)
    if config is None or step is None or not (step / ".metadata").is_file():
        raise FileNotFoundError(
            f"{source}: expected a Hugging Face folder (config.json), a run folder (config.toml and a complete "
            "checkpoint/step-N) or a step-N folder inside one"
        )
    return RunCheckpoint(config, step)


def architecture(source: str | Path) -> StudentArgs | TeacherArgs:
    """What a frozen model is: a Hugging Face folder's, or that of a run's checkpoint.

    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: its config.json is of no model of ours, or the run trained a quantized student.
    """
    if (Path(source) / "config.json").is_file() or not Path(source).is_dir():
        config = read_config(source)
        return student_args(config, source) if config.get("model_type") == "smollm3" else teacher_args(config, source)
    run = find_checkpoint(source).config
    if run.quantization.scheme != "none":
        raise ValueError(f"{source}: a student that was quantized while it trained; take one in full precision")
    args = configured_args(run)
    assert isinstance(args, StudentArgs | TeacherArgs)
    return args


def load_model(source: str | Path, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Reads a model from a Hugging Face folder, a run folder (its newest checkpoint) or one checkpoint `step-N`.

    Args:
        source: the folder.
        dtype: "float32" or "bfloat16", of the weights in memory.
        device: where to put it.

    Raises:
        FileNotFoundError: the folder is none of the three.
        ValueError: tensors are missing, extra or of another shape; all are listed.
    """
    source = Path(source)
    if (source / "config.json").is_file():
        return _load_hugging_face(source, dtype, device)
    config, step = find_checkpoint(source)
    problems = checkpoint_problems(model_on_meta(config), step)
    if problems:
        raise ValueError("\n".join(problems))
    model = empty_model(config, dtype, device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(model.state_dict(), checkpoint_id=str(step), no_dist=not dist.is_initialized())
    return LoadedModel(model, config.data.tokenizer, config.training.seq_len)


def empty_model(config: JobConfig, dtype: str = "float32", device: str = "cpu") -> ModelProtocol:
    """The configured model in memory that nobody has written yet, frozen and in evaluation mode.

    Args:
        config: names model and flavor.
        dtype: "float32" or "bfloat16".
        device: where to put it.
    """
    model = model_on_meta(config)
    _allocate(model, dtype, device)
    return model.eval()


def _load_hugging_face(folder: Path, dtype: str, device: str) -> LoadedModel:
    config = read_config(folder)
    with torch.device("meta"):
        if config.get("model_type") == "smollm3":
            model: ModelProtocol = Student(student_args(config, folder))
        else:
            model = Teacher(teacher_args(config, folder))
    _allocate(model, dtype, device)
    load_tensors(model, folder)
    max_tokens = config.get("text_config", config)["max_position_embeddings"]
    return LoadedModel(model.eval(), str(folder / "tokenizer.model"), max_tokens)


def _allocate(model: nn.Module, dtype: str, device: str) -> None:
    model.to(TORCH_DTYPE_MAP[dtype]).to_empty(device=device)
    model.requires_grad_(False)
