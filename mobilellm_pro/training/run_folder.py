"""What a run leaves beside its checkpoints, so that its folder explains itself.

config.toml      the resolved configuration of the latest start
environment.json package versions, commit, hardware, world size, command line
data.json        what the rows are drawn from: corpora, weights, checksums
metrics.jsonl    one line a logged or skipped step, validation or evaluation; after a resume, later ones of a step
                 replace earlier
run.lock         held by the run that is at work here; who it is
STOP             made by whoever wants the run to save a checkpoint and end
needle/          step-N.json: every cell of the needle test after step N, where [needle] asks for it
eval/            step-N/: what `evaluate` writes, after step N, where [evaluation] asks for it
DONE             written last: steps, wall seconds, checkpoint, the last validation and the last of each evaluation
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.data.mixture import Mixture
from mobilellm_pro.json_lines import append_record, read_records

PACKAGES = ("torch", "torchtitan", "torchdata", "tiktoken", "safetensors", "numpy", "mobilellm-pro")
METRICS = "metrics.jsonl"


def describe_environment(world_size: int) -> dict[str, Any]:
    """Versions, commit and hardware of this process."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpus": os.cpu_count(),
        "world_size": world_size,
        "commit": commit(),
        "command": sys.argv,
    }


def describe_data(config: JobConfig, mixture: Mixture) -> dict[str, Any]:
    """The mixture as it is in force, for whoever asks a year later what a model has read."""
    corpora = []
    for dataset, stream, weight in zip(config.data.datasets, mixture.streams, mixture.weights, strict=True):
        corpus = stream.corpus
        corpora.append(
            {
                "name": dataset.name,
                "path": str(Path(dataset.path).resolve()),
                "weight": float(weight),
                "documents": corpus.num_documents,
                "tokens": corpus.num_tokens,
                "tokenizer_fingerprint": corpus.manifest.fingerprint,
                "clusters": dataset.clusters,
                "shards_sha256": [record.bin_sha256 for record in corpus.manifest.shards[corpus.split]],
            }
        )
    return {"identity": mixture.identity, "corpora": corpora}


def processor_name() -> str:
    """The CPU as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the source tree, with "+" if it was changed since; None outside a checkout."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """Adds one line to metrics.jsonl."""
    append_record(folder / METRICS, record)


def read_metrics(folder: str | Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind in order of step; a step that was run twice counts once.

    Kinds are "train", "skipped", "validation" and the names of the evaluations that ran, as "needle".

    A line that a kill cut short is skipped: the resumed run has logged that step again.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected the folder of a run (its job.dump_folder)")
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_records(path):
        if record["kind"] == kind:
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]
