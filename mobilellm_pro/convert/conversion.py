"""The `convert` verb: DCP checkpoints to Hugging Face folders and back, exact to the bit at equal data type.

mobilellm-pro convert outputs/debug/1_language outputs/debug/hugging_face
mobilellm-pro convert outputs/debug/hugging_face outputs/debug/from_hugging_face/checkpoint/step-0
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch.distributed.checkpoint as dcp
from torch import Tensor

from mobilellm_pro.convert.safetensors_file import write_safetensors_file
from mobilellm_pro.data.hugging_face_tokenizer import write_hugging_face_tokenizer
from mobilellm_pro.data.tokenizer import Tokenizer, find_llama4_file
from mobilellm_pro.model.checkpoint import LoadedModel, load_model
from mobilellm_pro.model.hugging_face import hugging_face_name, student_config, teacher_config
from mobilellm_pro.model.stored_parameters import ParameterKind
from mobilellm_pro.model.student import Student

SHARD_BYTES = 5_000_000_000
"""Largest safetensors file, as Hugging Face's hub recommends; only a single larger tensor exceeds it."""


def convert(
    source: str, destination: str, *, dtype: Literal["float32", "bfloat16"] = "float32", overwrite: bool = False
) -> None:
    """Convert a checkpoint: DCP to a Hugging Face folder, or a Hugging Face folder to DCP.

    A Hugging Face folder gets config.json, safetensors, the tokenizer in both formats, and loads with
    `AutoModelForCausalLM.from_pretrained`. A DCP folder serves as `checkpoint.initial_load_path`.

    Args:
        source: a run folder (its newest checkpoint), one `step-N` folder, or a Hugging Face folder.
        destination: the folder to write.
        dtype: of the written weights.
        overwrite: replace a destination that is there already.

    Raises:
        ValueError: the source's tensors do not fit its architecture, or the destination exists.
    """
    target = Path(destination)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; remove it, choose another folder or say --overwrite")
    loaded = load_model(source, dtype)
    with whole_folder(target) as folder:
        if (Path(source) / "config.json").is_file():
            dcp.save(loaded.model.state_dict(), checkpoint_id=str(folder), no_dist=True)
        else:
            _write_hugging_face(loaded, folder, dtype)
    print(f"{source} -> {target} ({dtype})")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `path` after the block; what a kill has left of it is removed."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_hugging_face(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    write_description(loaded, folder, dtype)
    tensors = {hugging_face_name(name): tensor for name, tensor in loaded.model.state_dict().items()}
    write_safetensors(tensors, folder)


def write_description(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Everything of a Hugging Face folder but the weights: config.json, generation_config.json and the tokenizer.

    Args:
        loaded: the model, which may be on the meta device.
        folder: to write to.
        dtype: "float32" or "bfloat16", of the weights that will lie beside it.
    """
    tokenizer = Tokenizer.load(loaded.tokenizer)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    args = loaded.model.model_args
    if isinstance(loaded.model, Student):
        config = student_config(args, max_position_embeddings=loaded.max_tokens, dtype=dtype, **ids)
    else:
        config = teacher_config(args, dtype=dtype, **ids)
    _write_json(folder / "config.json", config)
    write_tokenizer(tokenizer, folder, max_tokens=loaded.max_tokens)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_tokens: int) -> None:
    """Writes a tokenizer for `transformers` with what ends a continuation, and the file that `Tokenizer.load` reads.

    Args:
        tokenizer: to write.
        folder: that of a model.
        max_tokens: longest row of the model.
    """
    write_hugging_face_tokenizer(tokenizer, folder, max_tokens=max_tokens)
    ids = {"bos": tokenizer.bos_id, "eos": list(tokenizer.stop_ids), "pad": tokenizer.pad_id}
    _write_json(folder / "generation_config.json", {f"{name}_token_id": value for name, value in ids.items()})
    source = find_llama4_file() if tokenizer.source == "llama4" else Path(tokenizer.source)
    shutil.copyfile(source, folder / "tokenizer.model")


def write_safetensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes model.safetensors, or numbered shards and their index when the tensors exceed `shard_bytes`."""
    kinds = {name: ParameterKind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_computed_safetensors(kinds, tensors.__getitem__, folder, shard_bytes)


def write_computed_safetensors(
    kinds: Mapping[str, ParameterKind],
    compute: Callable[[str], Tensor],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`write_safetensors` of tensors that are computed one at a time, as they are written.

    Args:
        kinds: name -> shape and type of every tensor.
        compute: name -> the tensor, of that shape and type.
        folder: to write to.
        shard_bytes: largest file, but for a single tensor that is larger.
    """
    shards = list(_shards({name: kind.num_bytes for name, kind in kinds.items()}, shard_bytes))
    if len(shards) == 1:
        write_safetensors_file(folder / "model.safetensors", kinds, compute)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors_file(folder / file, {name: kinds[name] for name in names}, compute)
        weight_map |= dict.fromkeys(names, file)
    total = sum(kind.num_bytes for kind in kinds.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, from their bytes."""
    shard: list[str] = []
    for name, size in sizes.items():
        if shard and sum(sizes[other] for other in shard) + size > shard_bytes:
            yield shard
            shard = []
        shard.append(name)
    yield shard


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
