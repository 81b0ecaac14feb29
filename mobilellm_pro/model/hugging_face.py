"""Names, config.json and safetensors of both models in Hugging Face's form.

The student is stock `SmolLM3ForCausalLM`, the teacher stock `Llama4ForCausalLM` (or the text part of the multimodal
`Llama4ForConditionalGeneration`). Modules are named as theirs, so a mapping is a prefix. `transformers` is not needed:
a folder is its config.json and its safetensors headers, which say all that can be wrong before a byte is loaded.
"""

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from mobilellm_pro.model.rotary import FrequencyScaling
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.model.teacher import TeacherArgs

SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "initializer_range",
)  # fmt: skip
TEACHER_KEYS = (
    *SHARED_KEYS, "intermediate_size_mlp", "num_local_experts", "interleave_moe_layer_step", "no_rope_layer_interval",
    "use_qk_norm", "attn_temperature_tuning", "floor_scale", "attn_scale", "attention_chunk_size",
    "max_position_embeddings",
)  # fmt: skip


def student_config(
    args: StudentArgs, *, max_position_embeddings: int, bos_id: int, eos_id: int, pad_id: int, dtype: str
) -> dict[str, Any]:
    """config.json with which `AutoModelForCausalLM` builds this student."""
    kinds = {"global": "full_attention", "local": "sliding_attention"}
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **{key: getattr(args, key) for key in SHARED_KEYS},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": args.sliding_window,
        "layer_types": [kinds[args.kind(i)] for i in range(args.num_hidden_layers)],
        "no_rope_layers": [1] * args.num_hidden_layers,
        # Version 5 of transformers reads the first, version 4 the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "rope_theta": args.rope_theta,
        "max_position_embeddings": max_position_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
    }


def student_args(config: dict[str, Any], source: str | Path) -> StudentArgs:
    """Architecture from a config.json that `student_config` wrote (or any SmolLM3 that this model can express)."""
    rope = config.get("rope_parameters") or {}
    wanted = {"model_type": "smollm3", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}
    _refuse_other(config, wanted, source)
    if set(config.get("no_rope_layers") or [0]) != {1}:
        raise ValueError(f"{source}: no_rope_layers switches RoPE off in some layers; this model has it in all")
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    return StudentArgs(
        **_pick(config, SHARED_KEYS, source),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        sliding_window=config.get("sliding_window") or config["max_position_embeddings"],
        global_layers=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
    )


def teacher_config(args: TeacherArgs, *, bos_id: int, eos_id: int, pad_id: int, dtype: str) -> dict[str, Any]:
    """config.json with which `transformers` builds a text-only Llama 4."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if args.rope_scaling is not None:
        rope = {"rope_type": "llama3", **args.rope_scaling.__dict__}
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        **{key: getattr(args, key) for key in TEACHER_KEYS},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_experts_per_tok": 1,
        "no_rope_layers": [int(args.uses_rope(i)) for i in range(args.num_hidden_layers)],
        "rope_parameters": {**rope, "rope_theta": args.rope_theta},
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
    }


def teacher_args(config: dict[str, Any], source: str | Path) -> TeacherArgs:
    """Architecture from a Llama 4 config.json, text-only or multimodal."""
    config = config.get("text_config", config)
    wanted = {"model_type": "llama4_text", "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu"}
    _refuse_other(config, {**wanted, "num_experts_per_tok": 1}, source)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = None
    if rope.get("rope_type", "default") == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = FrequencyScaling(**_pick(rope, keys, source))
    args = TeacherArgs(
        **_pick(config, [k for k in TEACHER_KEYS if k in config], source),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 500_000.0))),
        rope_scaling=scaling,
    )
    for key, ours in (
        ("no_rope_layers", [int(args.uses_rope(i)) for i in range(args.num_hidden_layers)]),
        ("moe_layers", [i for i in range(args.num_hidden_layers) if args.is_moe(i)]),
    ):
        if config.get(key) and list(config[key]) != ours:
            raise ValueError(f"{source}: {key} = {config[key]} does not follow from the interval; expected {ours}")
    return args


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a folder; the error says what is missing and how to get it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found; expected a Hugging Face folder with config.json and *.safetensors "
            "(download one with `hf download`, or write one with `mobilellm-pro convert`)"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def tensor_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the folder's safetensors, from the headers alone."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors file")
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise FileNotFoundError(
                f"{index}: names files that are not there: {', '.join(missing)}; download them again"
            )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes.update(_header_shapes(file))
    return shapes


def _header_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Header of one file: 8 bytes of length, then JSON; the data must end where the header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
        if length + 8 > size:
            raise ValueError(f"{file}: not a safetensors file, or truncated in its header; download it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: not a safetensors file (its header is no JSON); download it again") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end > size:
        raise ValueError(
            f"{file}: truncated: {size:,} bytes, its header promises {8 + length + end:,}; download it again"
        )
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def text_prefix(names: set[str]) -> str:
    """ "language_model." for the text part of a multimodal checkpoint, else ""."""
    return "language_model." if any(name.startswith("language_model.") for name in names) else ""


def hugging_face_name(name: str, prefix: str = "") -> str:
    """Our parameter name -> Hugging Face's: everything but the head lives under `model.`."""
    return prefix + (name if name == "lm_head.weight" else f"model.{name}")


def tensor_problems(model: nn.Module, folder: str | Path) -> list[str]:
    """Everything that keeps the folder's tensors from filling the model: missing, extra, wrongly shaped."""
    found = tensor_shapes(folder)
    prefix = text_prefix(set(found))
    wanted = {hugging_face_name(name, prefix): tuple(p.shape) for name, p in model.named_parameters()}
    problems = [f"{folder}: tensor {name} is missing" for name in wanted if name not in found]
    problems += [f"{folder}: tensor {name} is not part of the model" for name in found
                 if name.startswith(prefix) and name not in wanted and not _tied_head(model, name)]  # fmt: skip
    problems += [
        f"{folder}: tensor {name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return problems


def _tied_head(model: nn.Module, name: str) -> bool:
    return name == "lm_head.weight" and not hasattr(model, "lm_head")


def load_tensors(model: nn.Module, folder: str | Path) -> None:
    """Fills the model's (sharded) parameters from the folder; every rank reads its slices only.

    Raises:
        ValueError: listing every missing, extra and wrongly shaped tensor.
    """
    problems = tensor_problems(model, folder)
    if problems:
        raise ValueError("\n".join(problems))
    prefix = text_prefix(set(tensor_shapes(folder)))
    state = {hugging_face_name(name, prefix): tensor for name, tensor in model.state_dict().items()}
    read_into(state, HuggingFaceStorageReader(str(folder)))


def read_into(state: dict[str, Tensor], reader: FileSystemReader) -> None:
    """Fills tensors, sharded or whole, from a checkpoint; works with and without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


class PrefixAdapter(StateDictAdapter):
    """torchtitan's view of the same mapping, for `checkpoint.initial_load_in_hf` and `checkpoint.last_save_in_hf`."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Ours -> Hugging Face's names."""
        return {hugging_face_name(name): tensor for name, tensor in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """Hugging Face's -> our names."""
        return {name.removeprefix("model."): tensor for name, tensor in hf_state_dict.items()}


def _pick(config: dict[str, Any], keys: Any, source: str | Path) -> dict[str, Any]:
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(f"{source}: config.json lacks {', '.join(missing)}")
    return {key: config[key] for key in keys}


def _refuse_other(config: dict[str, Any], wanted: dict[str, Any], source: str | Path) -> None:
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{source}: {key} is {config[key]!r}; this model needs {value!r}")
