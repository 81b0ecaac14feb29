"""Merging: what it costs at full size, and what it is worth at toy size.

    python benchmarks/merging.py --only streaming --write benchmarks/results/merging_<hardware>_<yyyymm>.md
    NPROC=2 mobilellm-pro run train_configs/debug/pipeline.toml --only 2_context    # and what it needs
    NPROC=2 python benchmarks/merging.py --only seeds --seeds 1 2 3 --write ...

streaming   four branches of the 1B student and their parent, random float32 weights, written as a run on one rank
            writes them (22 GB in --folder, removed afterwards). A process of its own then writes the average as DCP
            and as a Hugging Face folder in bfloat16, and measures the distances from the parent. The bar is under
            6 GiB for the process and under 5 minutes for the two files; three parameters are compared with float64.
            The folder gets the debug tokenizer, which is there without a download.
seeds       for each seed of the data four specialists of one phase 2 checkpoint by `launch/train.sh`, as the debug
            pipeline trains them, then the verb `merge`. Bits per byte on the part valid of each domain, on which
            neither weights were chosen nor models trained. The bar: the merged model's mean is below every
            specialist's.
            Finished runs are not repeated.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from machine import ROOT, describe, most_resident, section_parser, write_sections

from mobilellm_pro.config import load
from mobilellm_pro.convert.merged_checkpoint import Branches, write_hugging_face_copy, write_merged
from mobilellm_pro.merging.drift import relative_distances
from mobilellm_pro.merging.weighted_average import LayerGroups
from mobilellm_pro.model.checkpoint import empty_model, latest_checkpoint
from mobilellm_pro.model.registry import model_on_meta
from mobilellm_pro.model.stored_parameters import StoredParameters

CONFIGS = ROOT / "train_configs/debug"
BRANCHES = ("knowledge", "code", "mathematics", "questions")
WEIGHTS = np.array([[0.4, 0.3, 0.2, 0.1]])
CHECKED = ("norm.weight", "layers.2.self_attn.k_proj.weight", "layers.3.mlp.down_proj.weight")
SECTIONS = ("streaming", "seeds")
TOKENIZER = ["--data.tokenizer", str(ROOT / "tests/assets/debug_tokenizer.model")]
GIB = 2**30


def main() -> None:
    """Command line."""
    parser = section_parser(__doc__, SECTIONS)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/merging_benchmark", help="of both sections")
    parser.add_argument("--config", type=Path, default=ROOT / "train_configs/mobilellm_pro_1b/2_context.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parent", type=Path, default=Path("outputs/debug/2_context"), help="phase 2 of the pipeline")
    parser.add_argument("--teacher", type=Path, default=Path("outputs/debug/0_teacher_hugging_face"))
    parser.add_argument("--measure", action="store_true", help="the process that `streaming` measures")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments)
        return
    run = {name: partial(globals()[name], arguments) for name in arguments.only}
    packages = ["torch", "torchtitan", "safetensors", "numpy"]
    write_sections(["# Merging", "", *describe(packages, torch.get_num_threads())], run, arguments.write)


def streaming(arguments: Namespace) -> list[str]:
    """Writes the branches, lets a process of its own merge them, and compares."""
    folder = arguments.folder / "streaming"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        begin = time.perf_counter()
        model = empty_model(load(arguments.config, TOKENIZER))
        for number in range(len(BRANCHES) + 1):
            torch.manual_seed(number)
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
            dcp.save(model.state_dict(), checkpoint_id=str(_step(folder, number)), no_dist=True)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        del model
        made = time.perf_counter() - begin
        command = [sys.executable, __file__, "--measure", "--folder", str(folder), "--config", str(arguments.config)]
        job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        sampled, _ = most_resident(job)
        assert job.stdout is not None and job.returncode == 0
        measured = json.loads(job.stdout.read().splitlines()[-1])
        error = _largest_error(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    gigabytes = 4 * num_parameters / 1e9
    what = {
        "dcp": (f"average of {len(BRANCHES)} branches, DCP in float32", len(BRANCHES) * gigabytes, gigabytes),
        "hugging_face": ("Hugging Face folder in bfloat16", gigabytes, gigabytes / 2),
        "distances": ("distances from the parent", (len(BRANCHES) + 1) * gigabytes, 0.0),
    }
    rows = ["| step | seconds | core seconds | GB read | GB written |", "|---|---:|---:|---:|---:|"]
    rows += [
        f"| {text} | {measured[name]:.0f} | {measured[f'{name}_cores']:.0f} | {read:.1f} | {written:.1f} |"
        for name, (text, read, written) in what.items()
    ]
    return [
        f"`--only streaming`: {num_parameters:,} parameters, four branches and their parent ({made:.0f} s to make).",
        "",
        *rows,
        "",
        f"Both files: {measured['dcp'] + measured['hugging_face']:.0f} s by the clock (bar: 300 s). Peak of the "
        f"process {measured['peak_bytes'] / GIB:.2f} GiB by the kernel's count, {sampled / GIB:.2f} GiB in samples of "
        f"50 ms (bar: 6 GiB), of which {measured['before_bytes'] / GIB:.2f} GiB were there before the first tensor. "
        f"Largest difference of three parameters from float64: {error:.1e} (their standard deviation is 0.01).",
        "",
        "Doubts: other work kept the machine busy (see the load average), so seconds by the clock are upper bounds; "
        "the files had just been written, so the system may have read part of them from its cache; one rank wrote "
        "them, where a run on many ranks leaves smaller pieces of each tensor.",
    ]


def _step(folder: Path, number: int) -> Path:
    """Of the parent (0) or a branch."""
    return folder / str(number) / "checkpoint/step-500"


def measure(arguments: Namespace) -> None:
    """Merges what lies in the folder, and prints seconds and bytes as JSON."""
    config, folder = load(arguments.config, TOKENIZER), arguments.folder
    names = [name for name, _ in model_on_meta(config).named_parameters()]
    branches = Branches([_step(folder, number + 1) for number in range(len(BRANCHES))], names)
    record: dict[str, float] = {"before_bytes": _peak_bytes()}
    step = folder / "merged/checkpoint/step-0"
    readers = [partial(branches.read, number) for number in range(len(BRANCHES))]
    (folder / "hugging_face").mkdir()
    steps: dict[str, Callable[[], object]] = {
        "dcp": lambda: write_merged(step, config, branches, WEIGHTS, LayerGroups(), "float32"),
        "hugging_face": lambda: write_hugging_face_copy(folder / "hugging_face", config, step, "bfloat16"),
        "distances": lambda: relative_distances(names, StoredParameters(_step(folder, 0)).read, readers),
    }
    for name, run in steps.items():
        begin, cores = time.perf_counter(), time.process_time()
        run()
        record |= {name: time.perf_counter() - begin, f"{name}_cores": time.process_time() - cores}
    print(json.dumps({**record, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """Most resident memory since this program began; getrusage also knows what the process was before it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _largest_error(folder: Path) -> float:
    stored = [StoredParameters(_step(folder, number + 1)) for number in range(len(BRANCHES))]
    merged = StoredParameters(folder / "merged/checkpoint/step-0")
    error = 0.0
    for name in CHECKED:
        truth = sum(weight * one.read(name).double() for weight, one in zip(WEIGHTS[0], stored))
        error = max(error, float((merged.read(name).double() - truth).abs().max()))
    return error


def seeds(arguments: Namespace) -> list[str]:
    """Trains and merges what is missing, and makes the table."""
    parent = latest_checkpoint(arguments.parent / "checkpoint")
    if parent is None:
        raise SystemExit(f"error: {arguments.parent}: no checkpoint; run the debug pipeline up to 2_context")
    results = {seed: _merged(arguments, parent, seed) for seed in arguments.seeds}
    first = results[arguments.seeds[0]]
    names = [row["name"] for row in first["rows"]]
    lines = [
        f"`--only seeds --seeds {' '.join(map(str, arguments.seeds))}`: mean bits per byte over "
        f"{', '.join(first['domains'])}, on the part valid, at least {min(first['valid_tokens'].values()):,} tokens of "
        "each.",
        "",
        "| seed | " + " | ".join(names) + f" | weights ({', '.join(first['branches'])}) | below every specialist |",
        "|---|" + "---:|" * len(names) + "---|---|",
    ]
    gains = []
    for seed, result in results.items():
        means = {row["name"]: row["mean"] for row in result["rows"]}
        best = min(means[name] for name in names if name.startswith("specialist"))
        gains.append(best - means[names[-1]])
        weights = " ".join(f"{weight:.3f}" for weight in result["weights"]["all"].values())
        cells = " | ".join(f"{means[name]:.4f}" for name in names)
        lines.append(f"| {seed} | {cells} | {weights} | {'yes' if gains[-1] > 0 else 'no'} |")
    spread = statistics.stdev(gains) if len(gains) > 1 else float("nan")
    return [
        *lines,
        "",
        f"Below the best specialist by {statistics.mean(gains):.4f} bits per byte in the mean, standard deviation over "
        f"seeds {spread:.4f}; {sum(gain > 0 for gain in gains)} of {len(gains)} seeds below every specialist.",
        "",
        "Doubts: toy sizes, and one parent: the seeds are of the specialists' data only.",
    ]


def _merged(arguments: Namespace, parent: Path, seed: int) -> dict:
    """merge.json of one seed."""
    folder = arguments.folder / f"seed_{seed}"
    branches = []
    for name in BRANCHES:
        words = [f"--job.dump_folder={folder / name}", f"--checkpoint.initial_load_path={parent}"]
        words += [f"--data.seed={seed}", f"--teacher.path={arguments.teacher}"]
        command = ["bash", "launch/train.sh", str(CONFIGS / f"3_specialist_{name}.toml"), *words]
        subprocess.run(command, cwd=ROOT, env=dict(os.environ), check=True)
        branches.append(f"{name}={folder / name}")
    output = folder / "merged"
    command = [sys.executable, "-m", "mobilellm_pro", "merge", str(CONFIGS / "3_merge.toml"), "--output", str(output)]
    subprocess.run([*command, "--parent", str(parent), "--branches", *branches], cwd=ROOT, check=True)
    return json.loads((output / "merge.json").read_text())


if __name__ == "__main__":
    main()
