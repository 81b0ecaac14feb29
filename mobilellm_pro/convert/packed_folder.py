"""Folders of packed four-bit integers: all that a quantized model is, in a file, and back to the bit.

Laid out like a Hugging Face folder, with names as there. model.safetensors holds, of a weight [R, C],

    <name>.int4      uint8 [R, C / 2]: the even column in the low half of a byte, the odd one in the high half
    <name>.scales    bfloat16 [R, G]: of each group of C / G neighbours

and norms in float32. config.json is the student's with a `quantization_config` that says all this, and with a model
type of its own: stock `transformers` refuses that, where of a quantization that it does not know it would only warn,
and go on with random weights. `torchao_folder` writes what it reads.

    write_packed(quantize_student(student, "cpu", tokenizer, 131_072), "outputs/int4")
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mobilellm_pro.convert.conversion import whole_folder, write_description
from mobilellm_pro.convert.quantized_model import (
    QuantizedModel,
    norm_shapes,
    student_on_meta,
    weight_shapes,
)
from mobilellm_pro.convert.unpacked_student import unpacked_student
from mobilellm_pro.model.checkpoint import LoadedModel
from mobilellm_pro.model.hugging_face import hugging_face_name, read_config, student_args
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.model.tensor_files import StoredTensor, stored_tensors
from mobilellm_pro.quantization.packed_int4 import pack, unpack
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight
from mobilellm_pro.quantization.scheme import SCHEMES, Scheme
from mobilellm_pro.quantization.token_quantizer import ZeroPoint
from mobilellm_pro.quantization.weight_quantizer import refuse_non_finite

MODEL_TYPE, VERSION = "mobilellm_pro_int4", 1
"""In config.json; the version counts layouts of the file."""

PACKING = "two integers a byte, the even column in the low half"
_AGAIN = "write the folder again"


def write_packed(model: QuantizedModel, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a folder, which is there as a whole or not at all.

    Args:
        model: of four bits or fewer.
        folder: to write.
        overwrite: replace a folder that is there already.

    Raises:
        ValueError: more than four bits, or the folder exists.
    """
    if model.scheme.weights.bits > 4:
        raise ValueError(f"weights of {model.scheme.weights.bits} bits; a packed folder holds four")
    tensors = {hugging_face_name(name): norm for name, norm in model.norms.items()}
    with new_folder(Path(folder), overwrite) as temporary:
        for name, (integers, scales) in model.weights.items():
            tensors[f"{hugging_face_name(name)}.int4"] = pack(integers)
            tensors[f"{hugging_face_name(name)}.scales"] = scales.contiguous()
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        record = _record(model.scheme_name, model.scheme, model.trained)
        changes = {"model_type": MODEL_TYPE, "architectures": None, "quantization_config": record}
        write_quantized_description(model, temporary, changes, model.dtype)


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """`whole_folder` of one that is not there, or may be replaced; else ValueError."""
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists already; remove it, choose another folder or say --overwrite")
    with whole_folder(folder) as temporary:
        yield temporary


def write_quantized_description(model: QuantizedModel, folder: Path, changes: Mapping[str, Any], dtype: str) -> None:
    """Everything of a folder but the weights; config.json also says whether the head has its own.

    Args:
        model: that lies beside it.
        folder: to write to.
        changes: keys of config.json that are other than a full-precision student's.
        dtype: "float32" or "bfloat16", of the numbers between layers.
    """
    loaded = LoadedModel(student_on_meta(model.args), model.tokenizer, model.max_tokens)
    write_description(loaded, folder, dtype)
    config = read_config(folder) | {"tie_word_embeddings": model.scheme.shared_table, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _record(scheme_name: str, scheme: Scheme, trained: bool) -> dict[str, Any]:
    """What config.json says of a packed folder."""
    return {
        "version": VERSION,
        "scheme": scheme_name,
        "trained": trained,
        **asdict(scheme),
        "scale_dtype": "bfloat16",
        "packing": PACKING,
    }


def is_packed(folder: str | Path) -> bool:
    """Whether a folder is one of these, by its config.json."""
    file = Path(folder) / "config.json"
    return file.is_file() and read_config(folder).get("model_type") == MODEL_TYPE


def read_packed(folder: str | Path) -> QuantizedModel:
    """Reads what `write_packed` wrote: the same integers and scales.

    Raises:
        FileNotFoundError: no config.json or no safetensors.
        ValueError: not such a folder, of another version, or tensors that are missing, extra, of another shape or type,
            or not finite; all that their headers show are listed, one a line.
    """
    config = read_config(folder)
    name, scheme, trained = _recorded(config, folder)
    args = student_args(config | {"model_type": "smollm3", "tie_word_embeddings": True}, folder)
    stored = stored_tensors(folder)
    problems = list(_differences(args, scheme, stored))
    if problems:
        raise ValueError("\n".join(f"{folder}: {problem}; {_AGAIN}" for problem in problems))
    weights, norms = {}, {}
    for own in weight_shapes(args, scheme):
        full = hugging_face_name(own)
        packed, scales = (_read(stored, f"{full}.{part}") for part in ("int4", "scales"))
        refuse_non_finite(f"{folder}: {full}.scales", scales)
        weights[own] = QuantizedWeight(unpack(packed), scales)
    for own in norm_shapes(args):
        norms[own] = _read(stored, hugging_face_name(own))
        refuse_non_finite(f"{folder}: {hugging_face_name(own)}", norms[own])
    tokenizer = str(Path(folder) / "tokenizer.model")
    return QuantizedModel(args, name, scheme, weights, norms, tokenizer, config["max_position_embeddings"], trained)


def load_packed_student(
    folder: str | Path, *, zero_point: ZeroPoint = "exact", dtype: str | None = None
) -> LoadedModel:
    """A packed folder as a student that runs, as `unpacked_student` makes it, with its tokenizer and longest row.

    Raises:
        FileNotFoundError, ValueError: as `read_packed`.
    """
    model = read_packed(folder)
    student = unpacked_student(model, zero_point=zero_point, dtype=dtype)
    return LoadedModel(student, model.tokenizer, model.max_tokens)


def _recorded(config: Mapping[str, Any], folder: str | Path) -> tuple[str, Scheme, bool]:
    """(name, scheme, whether it was trained) of a config.json."""
    file = Path(folder) / "config.json"
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f'{file}: model_type is {config.get("model_type")!r}; expected "{MODEL_TYPE}", a packed folder'
        )
    where, record = f"{file}: quantization_config", config.get("quantization_config")
    if not isinstance(record, dict) or record.get("version") != VERSION:
        found = record.get("version") if isinstance(record, dict) else None
        raise ValueError(f"{where} has version {found!r}; this program reads {VERSION}; {_AGAIN}")
    name, weights = record.get("scheme"), record.get("weights")
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"{where}.scheme is {name!r}; expected one of {', '.join(SCHEMES)}; {_AGAIN}")
    learned = isinstance(weights, dict) and bool(weights.get("learned"))
    scheme = replace(SCHEMES[name], weights=replace(SCHEMES[name].weights, learned=learned))
    trained = bool(record.get("trained"))
    for key, value in _record(name, scheme, trained).items():
        if record.get(key) != value:
            raise ValueError(f'{where}.{key} is {record.get(key)!r}; scheme "{name}" has {value!r}; {_AGAIN}')
    return name, scheme, trained


def _differences(args: StudentArgs, scheme: Scheme, stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """What the headers of the files have else than the scheme wants."""
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (rows, columns) in weight_shapes(args, scheme).items():
        full, group = hugging_face_name(name), scheme.weights.group_of(columns, name)
        wanted |= {f"{full}.int4": ("U8", (rows, columns // 2)), f"{full}.scales": ("BF16", (rows, columns // group))}
    wanted |= {hugging_face_name(name): ("F32", shape) for name, shape in norm_shapes(args).items()}
    yield from (f"tensor {name} is missing" for name in wanted if name not in stored)
    yield from (f"tensor {name} has no place in the model" for name in stored if name not in wanted)
    for name, (dtype, shape) in wanted.items():
        if name in stored and (stored[name].dtype, stored[name].shape) != (dtype, shape):
            found = stored[name]
            yield f"tensor {name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"


def _read(stored: Mapping[str, StoredTensor], name: str) -> Tensor:
    with safe_open(stored[name].file, framework="pt") as file:
        return file.get_tensor(name)
