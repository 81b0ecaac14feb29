"""Does distillation help? The debug student on the teacher's distributions against the same student on labels alone.

    bash launch/quickstart.sh                                  # makes the text and the teacher
    python benchmarks/distillation_gain.py --seeds 1 2 3       # about 3 minutes a seed on two CPU cores

For each seed (of the weights and of the order of the data) two runs with equal steps and equal rows; held-out bits per
byte after the last step. Finished runs are not repeated. Writes Markdown to benchmarks/results/.
"""

import argparse
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from mobilellm_pro.training.run_folder import describe_environment, read_metrics

ROOT = Path(__file__).parents[1]
CONFIG = "train_configs/debug/1_language.toml"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/debug/distillation_gain")
    parser.add_argument("--results", type=Path, help="Markdown file (default: named by processor and month)")
    arguments = parser.parse_args()
    results = {
        (seed, objective): run(arguments.out / f"{objective}_{seed}", seed, objective, arguments.ranks)
        for seed in arguments.seeds
        for objective in ("kl", "ce")
    }
    environment = describe_environment(arguments.ranks)
    text = report(results, arguments.seeds, environment)
    cpu = "_".join(environment["processor"].lower().split())
    path = arguments.results or ROOT / f"benchmarks/results/distillation_gain_{cpu}_{date.today():%Y%m}.md"
    path.write_text(text)
    print(text)


def run(folder: Path, seed: int, objective: str, ranks: int) -> dict[str, float]:
    """Trains (or finds) one run; its last validation and its median tokens a second."""
    overrides = ["--job.dump_folder", str(folder), "--distill.objective", objective]
    overrides += ["--debug.seed", str(seed), "--data.seed", str(seed)]
    environment = os.environ | {"NPROC": str(ranks)}
    subprocess.run(["bash", "launch/train.sh", CONFIG, *overrides], cwd=ROOT, env=environment, check=True)
    speeds = [record["tokens_per_second"] for record in read_metrics(folder, "train")]
    return read_metrics(folder, "validation")[-1] | {"tokens_per_second": statistics.median(speeds)}


def report(results: dict[tuple[int, str], dict[str, float]], seeds: list[int], environment: dict) -> str:
    """The table, what made it, and on what."""
    gains = [results[seed, "ce"]["bits_per_byte"] - results[seed, "kl"]["bits_per_byte"] for seed in seeds]
    steps = int(results[seeds[0], "kl"]["step"])
    lines = [
        "# Distillation against cross entropy, debug student, equal steps and rows",
        "",
        f"`python {' '.join(sys.argv)}` after `bash launch/quickstart.sh`",
        "",
        f"{environment['processor']}, {environment['cpus']} CPUs, Python {environment['python']}, "
        + ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version),
        "",
        f"Held-out bits per byte after {steps} steps; the seed is that of the weights and of the order of the data.",
        "",
        "| seed | teacher | cross entropy | distilled | gain | tokens/s cross entropy | tokens/s distilled |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, gain in zip(seeds, gains, strict=True):
        kl, ce = results[seed, "kl"], results[seed, "ce"]
        lines.append(
            f"| {seed} | {kl['teacher_bits_per_byte']:.4f} | {ce['bits_per_byte']:.4f} | {kl['bits_per_byte']:.4f} | "
            f"{gain:.4f} | {ce['tokens_per_second']:,.0f} | {kl['tokens_per_second']:,.0f} |"
        )
    spread = statistics.stdev(gains) if len(gains) > 1 else float("nan")
    lines += [
        "",
        f"Mean gain {statistics.mean(gains):.4f} bits per byte, standard deviation over seeds {spread:.4f}.",
        "",
        "Doubts: toy sizes and a teacher trained on the same corpora, for more steps than either student; equal steps "
        "are not equal FLOPs (a distilled step also runs the teacher forward); tokens/s vary with the machine's load.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
