"""What four bits cost, and what training for them regains: the debug student, rounded to nearest and trained.

    bash launch/quickstart.sh                                # makes the merged student in full precision
    python benchmarks/qat_recovery.py --seeds 1 2 3          # about five minutes a run on two idle cores, five a seed

The report's Tables 15 to 17 in miniature. Every run begins with the merged student; the seed is that of the order of
the data. Models are compared on whole held-out documents (`mobilellm-pro held-out`): bits per byte, and the mean KL
from the merged student, which is what rounding did and not what training on more text did. Finished runs are not
repeated.
"""

import argparse
import math
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from machine import ROOT, describe

from mobilellm_pro.config import JobConfig, load
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.held_out import held_out_documents, held_out_settings
from mobilellm_pro.evaluation.student_checkpoint import load_student

JOB = "train_configs/debug/{name}.toml"
VARIANTS = {
    "cpu, QAT without KD": ("4_qat_cpu", ["--distill.objective=ce"]),
    "cpu, QAT with KD": ("4_qat_cpu", []),
    "accelerator, QAT without KD, learned ranges": ("4_qat_accelerator", ["--distill.objective=ce"]),
    "accelerator, QAT with KD, computed ranges": ("4_qat_accelerator", ["--quantization.learned_ranges=false"]),
    "accelerator, QAT with KD, learned ranges": ("4_qat_accelerator", []),
}


class Score(NamedTuple):
    """On held-out documents."""

    bits_per_byte: float
    kl: float
    """From the merged student in full precision, nats a token."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--merged", type=Path, default=ROOT / "outputs/debug/3_merge/checkpoint/step-0")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/debug/qat_recovery")
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--tokens", type=int, default=40_000, help="held-out tokens that are read")
    parser.add_argument("--write", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    job = load(JOB.format(name="4_qat_cpu"))
    texts = _texts(job, arguments.tokens)
    full = _log_probabilities(str(arguments.merged), texts)
    scores = {("full precision", None): _score(str(arguments.merged), job, texts, full)}
    for scheme in ("cpu", "accelerator"):
        scores[f"{scheme}, rounded to nearest", None] = _score(str(arguments.merged), job, texts, full, scheme)
    for name, (config, overrides) in VARIANTS.items():
        for seed in arguments.seeds:
            folder = arguments.out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            words = [*overrides, f"--data.seed={100 + seed}", f"--training.steps={arguments.steps}"]
            _train(config, folder, arguments.merged, words)
            scores[name, seed] = _score(str(folder), job, texts, full)
    head = f"{arguments.steps} steps of {job.training.global_batch_size} rows of {job.training.seq_len} tokens"
    lines = list(_report(scores, f"{head}, {sum(map(len, texts)):,} held-out tokens"))
    print("\n".join(lines))
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n")


def _train(config: str, folder: Path, merged: Path, overrides: list[str]) -> None:
    words = [f"--job.dump_folder={folder}", f"--teacher.path={merged}", f"--checkpoint.initial_load_path={merged}"]
    command = ["bash", "launch/train.sh", JOB.format(name=config), *words, "--validation.no_enable", *overrides]
    subprocess.run(command, cwd=ROOT, check=True)


def _texts(job: JobConfig, num_tokens: int) -> list[torch.Tensor]:
    """Ids [S] of documents."""
    settings = held_out_settings(job) | {"tokens": num_tokens}
    documents = held_out_documents(settings, Tokenizer.load(job.data.tokenizer))
    return [torch.from_numpy(ids.astype(np.int64)) for _, ids in documents]


@torch.no_grad()
def _log_probabilities(checkpoint: str, texts: list[torch.Tensor], quantize: str | None = None) -> list[torch.Tensor]:
    """[S - 1, V] of each document, in fp32; all are kept where they are compared with."""
    model = load_student(checkpoint, quantize=quantize).model
    return [model(ids[None, :-1])[0].log_softmax(-1).half() for ids in texts]


@torch.no_grad()
def _score(
    checkpoint: str, job: JobConfig, texts: list[torch.Tensor], full: list[torch.Tensor], quantize: str | None = None
) -> Score:
    token_bytes = Tokenizer.load(job.data.tokenizer).token_bytes
    model = load_student(checkpoint, quantize=quantize).model
    nats = divergence = num_bytes = num_tokens = 0.0
    for ids, teacher in zip(texts, full, strict=True):
        ours, wanted = model(ids[None, :-1])[0].log_softmax(-1), teacher.float()
        nats -= float(ours.gather(1, ids[1:, None]).sum())
        divergence += float((wanted.exp() * (wanted - ours)).sum())
        num_bytes += float(token_bytes[ids[1:].numpy()].sum())
        num_tokens += len(ids) - 1
    return Score(nats / (math.log(2) * num_bytes), divergence / num_tokens)


def _report(scores: dict, settings: str) -> Iterator[str]:
    full = scores["full precision", None]
    yield "# Four bits, debug student: rounded to nearest and trained"
    yield ""
    yield from describe(["torch", "torchtitan", "torchao"])
    yield ""
    yield f"{settings}. Regained: of what rounding to nearest lost."
    yield ""
    yield "| model | bits per byte, by seed | mean | KL, by seed | mean | regained: bits | KL |"
    yield "|---|---|---:|---|---:|---:|---:|"
    for name in dict.fromkeys(name for name, _ in scores):
        found = [score for (own, _), score in scores.items() if own == name]
        bits, kls = ([getattr(score, key) for score in found] for key in ("bits_per_byte", "kl"))
        rounded = scores.get((f"{name.split(',')[0]}, rounded to nearest", None), full)
        regained = " |"
        if "QAT" in name:
            of_bits = (rounded.bits_per_byte - statistics.mean(bits)) / (rounded.bits_per_byte - full.bits_per_byte)
            regained = f"{of_bits:.0%} | {1 - statistics.mean(kls) / rounded.kl:.0%}"
        yield (
            f"| {name} | {' / '.join(f'{x:.4f}' for x in bits)} | {statistics.mean(bits):.4f} | "
            f"{' / '.join(f'{x:.5f}' for x in kls)} | {statistics.mean(kls):.5f} | {regained} |"
        )
    yield ""
    yield "Doubts: a student of 0.8M parameters that has read half a million tokens loses little by rounding; bits per"
    yield "byte move more by the tokens that are trained on than by rounding, KL from the merged student does not."


if __name__ == "__main__":
    main()
