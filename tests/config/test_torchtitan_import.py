"""torchtitan without an accelerator, and its heavy imports put off but not skipped.

Most of it in processes of their own: the order of the first imports is what is tested.
"""

import subprocess
import sys

import pytest
import torch

WITHOUT_ACCELERATOR = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without an accelerator")


def output_of(program: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_a_configuration_loads_within_a_second_of_torch():
    program = """
import time, sys, torch
start = time.perf_counter()
import mobilellm_pro.config
from mobilellm_pro.config import ConfigError, load
try:
    load("nowhere.toml")
except ConfigError:
    print(time.perf_counter() - start, "torchtitan.models" in sys.modules)
"""
    seconds, models_imported = output_of(program)
    assert float(seconds) < 1.5 and models_imported == "False"


@WITHOUT_ACCELERATOR
def test_the_trainer_imports_and_takes_the_cpu():
    program = """
import mobilellm_pro.config
import torchtitan
import torchtitan.train
from torchtitan.components.metrics import build_device_memory_monitor
from torchtitan.protocols.model_converter import _registry_model_converter_cls as converters
from torchtitan.tools import utils
import torch
print(utils.device_type, torch._utils._get_available_device_type(), torchtitan.__version__, len(converters) > 0)
stats = build_device_memory_monitor().get_peak_stats()
print(utils.get_peak_flops("x"), 0 < stats.max_active_gib < 64, 0 < stats.max_active_pct <= 100)
"""
    assert output_of(program) == ["cpu", "None", "0.2.2", "True", "inf", "True", "True"]


@WITHOUT_ACCELERATOR
def test_the_peak_of_memory_starts_anew():
    from mobilellm_pro.config import cpu_device

    block = torch.ones(2**26)
    high = cpu_device.memory_stats()["active_bytes.all.peak"]
    del block
    cpu_device.reset_peak_memory_stats()
    assert high - cpu_device.memory_stats()["active_bytes.all.peak"] > 2**27
    assert cpu_device.current_device() == 0  # a number, as barriers over a device want it
    assert cpu_device.get_device_properties().total_memory > high
