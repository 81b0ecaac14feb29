"""What a reader needs to know to repeat a measurement; every benchmark writes it above its tables."""

import os
import platform
import shlex
import sys
from importlib import metadata

import torch

from mobilellm_pro.training.run_folder import commit, processor_name


def describe(packages: list[str], threads: int | None = None) -> list[str]:
    """Lines of Markdown: command, commit, processor, threads in use, versions of those packages that are installed."""
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    used = f", {threads} threads" if threads else ""
    versions = {x.metadata["Name"].lower().replace("_", "-"): x.version for x in metadata.distributions()}
    return [
        f"Command: `python {shlex.join(sys.argv)}`, commit {(commit() or 'unknown')[:12]}",
        "",
        f"Machine: {processor_name()}, {os.cpu_count()} CPUs{used}{device}, {platform.platform()}, "
        f"Python {platform.python_version()}",
        "",
        "Versions: " + ", ".join(f"{x} {versions[x]}" for x in packages if x in versions),
    ]
