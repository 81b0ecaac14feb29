"""Hugging Face folders for tests."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mobilellm_pro.model.hugging_face import teacher_config
from mobilellm_pro.model.teacher import FLAVORS

SMALL_TEACHER = replace(
    FLAVORS["debug"],
    vocab_size=150,
    hidden_size=64,
    intermediate_size=48,
    intermediate_size_mlp=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=3,
)
"""Uneven over two and over four ranks."""

VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "vision_output_dim": 32, "image_size": 28, "patch_size": 14, "projector_input_dim": 32, "projector_output_dim": 32,
}  # fmt: skip
"""A vision model beside a text model; nothing of it is read."""


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def write_stock_teachers(folder: Path) -> dict[str, Path]:
    """One `SMALL_TEACHER` as `transformers` writes it: in one file, in shards, and inside a multimodal model."""
    # Ranks import this module too, and need no transformers.
    from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

    config = teacher_config(SMALL_TEACHER, bos_id=1, eos_id=2, pad_id=3, dtype="float32")
    for key in ("architectures", "model_type", "torch_dtype"):
        config.pop(key)
    text = Llama4ForCausalLM(Llama4TextConfig(**config))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in text.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    text.save_pretrained(folder / "text")
    text.save_pretrained(folder / "shards", max_shard_size="60KB")
    whole = Llama4ForConditionalGeneration(Llama4Config(text_config=text.config.to_dict(), vision_config=VISION))
    whole.language_model.load_state_dict(text.state_dict())
    whole.save_pretrained(folder / "multimodal", max_shard_size="100KB")
    folders = {name: folder / name for name in ("text", "shards", "multimodal")}
    num_files = [len(list(path.glob("*.safetensors"))) for path in folders.values()]
    assert num_files[0] == 1 and 3 < num_files[2] and 3 < num_files[1], num_files
    return folders
