"""Names and config.json of both models in Hugging Face's form.

The student is stock `SmolLM3ForCausalLM`, the teacher stock `Llama4ForCausalLM` (or the text part of the multimodal
`Llama4ForConditionalGeneration`). Modules are named as theirs, so a mapping is a prefix. `transformers` is not needed:
a folder is its config.json and its safetensors (`tensor_files`).
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future
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


def text_prefix(names: Iterable[str]) -> str:
    """ "language_model." for the text part of a multimodal checkpoint, else ""."""
    return "language_model." if any(name.startswith("language_model.") for name in names) else ""


def hugging_face_name(name: str, prefix: str = "") -> str:
    """Our parameter name -> Hugging Face's: everything but the head lives under `model.`."""
    return prefix + (name if name == "lm_head.weight" else f"model.{name}")


class TextReader(HuggingFaceStorageReader):
    """torchtitan's reader of a folder, which sees the text model's tensors under their names without a prefix.

    `load_tensors` is the way to load a model; this is for checkpoints that torchtitan itself loads.
    """

    def read_metadata(self) -> Metadata:
        """Shapes and types of the text model's tensors."""
        metadata = super().read_metadata()
        stored = metadata.state_dict_metadata
        self.prefix = text_prefix(stored)
        metadata.state_dict_metadata = {
            name.removeprefix(self.prefix): entry for name, entry in stored.items() if name.startswith(self.prefix)
        }
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills what the plan asks for; in the files the names have their prefix."""
        items = [
            replace(item, storage_index=replace(item.storage_index, fqn=self.prefix + item.storage_index.fqn))
            for item in plan.items
        ]
        return super().read_data(replace(plan, items=items), planner)


class PrefixAdapter(StateDictAdapter):
    """torchtitan's view of the same mapping, for `checkpoint.initial_load_in_hf` and `checkpoint.last_save_in_hf`."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Ours -> Hugging Face's names of a text model."""
        return {hugging_face_name(name): tensor for name, tensor in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """Hugging Face's -> our names."""
        prefix = text_prefix(hf_state_dict)
        return {
            name.removeprefix(prefix).removeprefix("model."): tensor
            for name, tensor in hf_state_dict.items()
            if name.startswith(prefix)
        }

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        """Reads text-only folders and the text part of multimodal ones; quantized ones are refused with the keys."""
        return TextReader(path)


def _pick(config: dict[str, Any], keys: Any, source: str | Path) -> dict[str, Any]:
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(f"{source}: config.json lacks {', '.join(missing)}")
    return {key: config[key] for key in keys}


def _refuse_other(config: dict[str, Any], wanted: dict[str, Any], source: str | Path) -> None:
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{source}: {key} is {config[key]!r}; this model needs {value!r}")
