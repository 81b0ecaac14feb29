"""Folders that stock `transformers` and torchao load: `AutoModelForCausalLM.from_pretrained(folder)`, no remote code.

The tensors are torchao's `IntxUnpackedToInt8Tensor`, made of the integers and scales of a quantized model: nothing is
rounded again. It is the one kind of four-bit tensor that both libraries restore from safetensors on any device, and it
spends a byte on an integer, in the file and in memory; `packed_folder` is half the size. With torchao 0.18 and
transformers 5.23,

- embedding and head are one tensor where the scheme has one table, and two where it has two;
- activations of the CPU scheme are rounded per token to eight bits with a range that holds zero and an integer that
  stands for it, as integer kernels do, and not with the paper's Eq. 3;
- the type of the KV cache is no property of a folder: it is the model's, unless the caller passes another cache.
  These two are what logits differ in from training: `unpacked_student(model, zero_point="integer", round_cache=False)`
  computes the same, but for an activation in some thousands that lies between two integers;
- each product and each lookup restores its whole weight first: right for checks and evaluations, slow for use;
- `save_pretrained` of what was loaded is not implemented by transformers.

The file is written here, in the layout of torchao's `flatten_tensor_state_dict`: that function names the rounding of
activations in a way that its counterpart does not read.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mobilellm_pro.convert.packed_folder import new_folder, write_quantized_description
from mobilellm_pro.convert.quantized_model import QuantizedModel
from mobilellm_pro.convert.unpacked_student import unpacked_student
from mobilellm_pro.model.hugging_face import hugging_face_name
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight
from mobilellm_pro.quantization.scheme import Scheme

ACTIVATION = "int8_asym_per_token"
"""torchao's name of the only rounding of activations that its tensor knows."""

PARTS = ("qdata", "scale", "zero_point")
"""Of a quantized weight: int8 [R, C], bfloat16 [R, G], int8 zeros [R, G]."""


class Differences(NamedTuple):
    """Of the logits of a loaded folder, as root mean squares."""

    arithmetic: float
    """From the eager model that rounds activations as integer kernels do, and no keys and values."""

    training: float
    """From the eager model as it was trained."""

    logits: float
    """Of the latter, about their mean: what the others compare with."""

    same_tokens: float
    """Share of positions with the most likely token of the eager model as it was trained."""


def write_torchao(
    model: QuantizedModel, folder: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Writes a folder, which is there as a whole or not at all.

    Args:
        model: whose activations have eight bits or none.
        folder: to write.
        dtype: "float32", "bfloat16" or default model.dtype: of weights when they are restored, and of activations.
        overwrite: replace a folder that is there already.

    Raises:
        ValueError: torchao has no such activations, or is not installed; or the folder exists.
    """
    quantization, dtype = _quantization_config(model.scheme), dtype or model.dtype
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for name, weight in model.weights.items():
        full = hugging_face_name(name)
        tensors |= _parts(full, weight)
        kinds[full] = _kind(weight, model.scheme, dtype)
    for name, norm in model.norms.items():
        tensors[hugging_face_name(name)] = norm
        kinds[hugging_face_name(name)] = {"_type": "Tensor"}
    metadata = {name: json.dumps(kind) for name, kind in kinds.items()}
    metadata |= {"tensor_names": json.dumps(list(kinds)), "format": "pt"}
    with new_folder(Path(folder), overwrite) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata)
        write_quantized_description(model, temporary, {"quantization_config": quantization}, dtype)


@torch.no_grad()
def check_torchao(folder: str | Path, model: QuantizedModel, tokens: Tensor) -> Differences:
    """Loads a folder with `transformers` and compares it with the model that it was written from.

    Args:
        folder: that `write_torchao` wrote.
        model: the same.
        tokens: [B, S] ids to compare logits on.

    Raises:
        ValueError: a package is missing, or an integer, a scale or a norm differs; the tensor is named.
    """
    _require("transformers", "torchao")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    _refuse_other_numbers(theirs, model, folder)
    dtype, logits = str(theirs.dtype).removeprefix("torch."), theirs(tokens).logits.float()
    del theirs  # one model in memory at a time
    like_theirs = unpacked_student(model, zero_point="integer", round_cache=False, dtype=dtype)
    arithmetic = like_theirs(tokens).float()
    del like_theirs
    trained = unpacked_student(model, dtype=dtype)(tokens).float()
    return Differences(
        arithmetic=_root_mean_square(logits - arithmetic),
        training=_root_mean_square(logits - trained),
        logits=_root_mean_square(trained - trained.mean()),
        same_tokens=float((logits.argmax(-1) == trained.argmax(-1)).float().mean()),
    )


def _refuse_other_numbers(theirs: nn.Module, model: QuantizedModel, folder: str | Path) -> None:
    loaded = dict(theirs.named_parameters(remove_duplicate=False))
    for name, weight in model.weights.items():
        tensor = loaded[hugging_face_name(name)]
        for part, ours in zip(PARTS, _parts(name, weight).values()):
            if not torch.equal(getattr(tensor, part, torch.empty(0)), ours):
                raise ValueError(f"{folder}: transformers has another {part} of {name}; do not use this folder")
    for name, norm in model.norms.items():
        tensor = loaded[hugging_face_name(name)]
        if not torch.equal(tensor, norm.to(tensor.dtype)):
            raise ValueError(f"{folder}: transformers has another {name}; do not use this folder")


def _root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _parts(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Names in the file -> tensors: "a.weight" is stored as "a._weight_qdata" and so on."""
    module, _, own = name.rpartition(".")
    zeros = torch.zeros(weight.scales.shape, dtype=torch.int8)  # symmetric; torchao wants them all the same
    tensors = (weight.integers.contiguous(), weight.scales.contiguous(), zeros)
    return {f"{module}._{own}_{part}": tensor for part, tensor in zip(PARTS, tensors)}


def _kind(weight: QuantizedWeight, scheme: Scheme, dtype: str) -> dict[str, Any]:
    """A tensor's attributes as torchao's JSON has them."""
    attributes = {
        "target_dtype": _type(f"int{scheme.weights.bits}"),
        "block_size": [1, weight.integers.shape[1] // weight.scales.shape[1]],
        "dtype": _type(dtype),
        "activation_quantization": None if scheme.activation_bits is None else ACTIVATION,
    }
    return {"_type": "IntxUnpackedToInt8Tensor", "_data": attributes, "_tensor_data_names": list(PARTS)}


def _type(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _quantization_config(scheme: Scheme) -> dict[str, Any]:
    """What config.json says: the settings with which torchao itself would make tensors of this kind."""
    if scheme.activation_bits not in (None, 8):
        raise ValueError(f"activations of {scheme.activation_bits} bits; torchao's tensors know 8, or none at all")
    _require("torchao")
    from torchao.core.config import config_to_dict
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup

    weights = scheme.weights
    bits, group = getattr(torch, f"int{weights.bits}"), PerAxis(0) if weights.group is None else PerGroup(weights.group)
    if scheme.activation_bits is None:
        kind: Any = IntxWeightOnlyConfig(bits, group, scale_dtype=torch.bfloat16)
    else:
        kind = Int8DynamicActivationIntxWeightConfig(bits, group, weight_scale_dtype=torch.bfloat16)
    return {
        "quant_method": "torchao",
        "quant_type": {"default": config_to_dict(kind)},
        "modules_to_not_convert": None,
        "include_input_output_embeddings": True,
        "untie_embedding_weights": False,
    }


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not installed; pip install 'mobilellm-pro[export,hf]', or in a checkout "
            "pip install -e '.[export,hf]'"
        )
