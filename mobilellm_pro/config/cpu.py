"""Makes torchtitan importable and usable on a machine without an accelerator, without touching its files.

torchtitan expects a GPU in two places, both at import time:

- its mixture-of-experts kernels import triton, which CPU builds of torch do not bring;
- `torchtitan.tools.utils` asks torch once for the device type and falls back to CUDA when there is none.

`choose_device()` answers both and does nothing where there is an accelerator. `mobilellm_pro.config` calls it on
import, before the first import of torchtitan.

The peak FLOPS of a CPU are unknown to torchtitan, which then takes an A100's. The answer here is infinity, so that the
"model FLOPS utilisation" of a CPU run reads 0 instead of a made-up share of a GPU that is not there.
"""

import importlib
import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import torch
import torch._utils

from mobilellm_pro.config import cpu_device

_TITAN_UTILS = "torchtitan.tools.utils"
_TITAN_TRITON_KERNELS = "torchtitan.models.moe.kernels"


def choose_device() -> None:
    """Make torchtitan take the CPU for its device, if this machine has nothing better.

    Does nothing where torch finds an accelerator, or when it has been called before.

    Raises:
        RuntimeError: torchtitan was imported earlier and has already settled on CUDA.
    """
    if torch._utils._get_available_device_type() is not None:
        return
    if _TITAN_UTILS in sys.modules:
        _refuse_if_settled_on_accelerator()
        return
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(_TITAN_TRITON_KERNELS, _kernels_without_triton())
    _import_with_cpu_as_device()


def _refuse_if_settled_on_accelerator() -> None:
    device_type = sys.modules[_TITAN_UTILS].device_type
    if device_type != "cpu":
        raise RuntimeError(
            f"torchtitan was imported before mobilellm_pro.config and took {device_type!r} for its device, which this "
            "machine does not have; import mobilellm_pro.config first"
        )


def _kernels_without_triton() -> ModuleType:
    """Stands for the triton kernels. A stub of `triton` itself would make torch.compile believe that it is there."""

    def generate_permute_indices(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("torchtitan's mixture of experts needs triton, which is not installed")

    module = ModuleType(_TITAN_TRITON_KERNELS, "Stub: triton is not installed.")
    vars(module).update(generate_permute_indices=generate_permute_indices)
    return module


def _import_with_cpu_as_device() -> None:
    """Import torchtitan's device module while torch answers that the CPU is the device.

    That module imports nothing of torch that could keep the answer (`torchtitan_import.py` sees to it that the
    package's own imports wait), so that for everyone else torch goes on answering as usual.
    """
    find_type, find_module = torch._utils._get_available_device_type, torch._utils._get_device_module
    vars(torch._utils).update(
        _get_available_device_type=lambda: "cpu",
        _get_device_module=lambda device_type: cpu_device,
    )
    try:
        titan_utils = importlib.import_module(_TITAN_UTILS)
    finally:
        torch._utils._get_available_device_type = find_type
        torch._utils._get_device_module = find_module
    vars(titan_utils).update(get_peak_flops=lambda device_name: math.inf)
