"""What four bits cost, and what training for them regains: the debug student, rounded to nearest and trained.

    bash launch/quickstart.sh                                # makes the merged student in full precision
    python benchmarks/qat_recovery.py --seeds 1 2 3          # about five minutes a run on two idle cores, six a seed

The report's Tables 15 to 17 in miniature. Every run begins with the merged student; the seed is that of the order of
the data. Models are compared on held-out documents, as `mobilellm-pro held-out` reads them: bits per byte, and the mean
KL from the merged student, which is what rounding did and not what training on more text did. Finished runs are not
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

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.config import load
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.held_out import held_out_documents, held_out_settings
from mobilellm_pro.evaluation.student_checkpoint import load_student
from mobilellm_pro.model.student import Student

JOB = "train_configs/debug/{name}.toml"
WITHOUT_KD, COMPUTED = "--distill.objective=ce", "--quantization.learned_ranges=false"
VARIANTS = {
    "cpu, QAT without KD": ("4_qat_cpu", [WITHOUT_KD]),
    "cpu, QAT with KD": ("4_qat_cpu", []),
    "accelerator, QAT without KD, learned ranges": ("4_qat_accelerator", [WITHOUT_KD]),
    "accelerator, QAT without KD, computed ranges": ("4_qat_accelerator", [WITHOUT_KD, COMPUTED]),
    "accelerator, QAT with KD, computed ranges": ("4_qat_accelerator", [COMPUTED]),
    "accelerator, QAT with KD, learned ranges": ("4_qat_accelerator", []),
}


class Score(NamedTuple):
    """Of each held-out document, summed over its tokens, [N]."""

    nats: np.ndarray
    kl: np.ndarray
    """From the merged student in full precision."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--merged", type=Path, default=ROOT / "outputs/debug/3_merge/checkpoint/step-0")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/debug/qat_recovery")
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--tokens", type=int, default=150_000, help="held-out tokens, if there are so many")
    parser.add_argument("--write", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    job = load(JOB.format(name="4_qat_cpu"))
    tokenizer = Tokenizer.load(job.data.tokenizer)
    documents = held_out_documents(held_out_settings(job) | {"tokens": arguments.tokens}, tokenizer)
    texts = [torch.from_numpy(ids.astype(np.int64)) for _, ids in documents]
    merged = load_student(str(arguments.merged)).model
    full = [_log_probabilities(merged, ids) for ids in texts]  # 1.8 GB at 107,000 tokens
    scores = {("full precision", None): _score(merged, full, texts)}
    for scheme in ("cpu", "accelerator"):
        rounded = load_student(str(arguments.merged), quantize=scheme).model
        scores[f"{scheme}, rounded to nearest", None] = _score(rounded, full, texts)
    for name, (config, overrides) in VARIANTS.items():
        for seed in arguments.seeds:
            folder = arguments.out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            words = [*overrides, f"--data.seed={100 + seed}", f"--training.steps={arguments.steps}"]
            _train(config, folder, arguments.merged, words)
            scores[name, seed] = _score(load_student(str(folder)).model, full, texts)
    trained = f"{arguments.steps} steps of {job.training.global_batch_size} rows of {job.training.seq_len} tokens"
    num_bytes = sum(int(tokenizer.token_bytes[ids[1:].numpy()].sum()) for ids in texts)
    num_tokens = sum(len(ids) - 1 for ids in texts)
    head = f"{trained}; {num_tokens:,} tokens of {len(texts):,} held-out documents"
    lines = list(_report(scores, head, num_bytes, num_tokens))
    print("\n".join(lines))
    if arguments.write:
        write_atomically(arguments.write, "\n".join(lines) + "\n")


def _train(config: str, folder: Path, merged: Path, overrides: list[str]) -> None:
    words = [f"--job.dump_folder={folder}", f"--teacher.path={merged}", f"--checkpoint.initial_load_path={merged}"]
    command = ["bash", "launch/train.sh", JOB.format(name=config), *words, "--validation.no_enable", *overrides]
    subprocess.run(command, cwd=ROOT, check=True)


@torch.no_grad()
def _log_probabilities(model: Student, ids: torch.Tensor) -> torch.Tensor:
    """[S - 1, V] of tokens 1, 2, ..."""
    return model(ids[None, :-1])[0].log_softmax(-1)


def _score(model: Student, full: list[torch.Tensor], texts: list[torch.Tensor]) -> Score:
    nats, kl = np.zeros(len(texts)), np.zeros(len(texts))
    for index, (ids, wanted) in enumerate(zip(texts, full, strict=True)):
        ours = _log_probabilities(model, ids)
        nats[index] = -float(ours.gather(1, ids[1:, None]).sum())
        kl[index] = float((wanted.exp() * (wanted - ours)).sum())
    return Score(nats, kl)


def _regained(scores: dict, name: str, key: str) -> str:
    """The share of what rounding to nearest lost, in the mean over seeds, and 95 % of it over documents drawn anew."""
    full = getattr(scores["full precision", None], key)
    rounded = getattr(scores[f"{name.split(',')[0]}, rounded to nearest", None], key)
    trained = np.mean([getattr(score, key) for (own, _), score in scores.items() if own == name], axis=0)
    left, lost = trained - full, rounded - full
    draws = np.random.default_rng(0).integers(0, len(full), (2000, len(full)))
    low, high = np.quantile(1 - left[draws].sum(1) / lost[draws].sum(1), (0.025, 0.975))
    return f"{1 - left.sum() / lost.sum():.0%} ({low:.0%} to {high:.0%})"


def _report(scores: dict, settings: str, num_bytes: int, num_tokens: int) -> Iterator[str]:
    yield "# Four bits, debug student: rounded to nearest and trained"
    yield ""
    yield from describe(["torch", "torchtitan", "torchao"])
    yield ""
    yield f"{settings}. Regained: of what rounding to nearest lost, mean of the seeds (95 %: bootstrap of documents)."
    yield ""
    yield "| model | bits per byte, by seed | mean | KL, nats a token, by seed | mean | regained: bits | KL |"
    yield "|---|---|---:|---|---:|---:|---:|"
    for name in dict.fromkeys(name for name, _ in scores):
        found = [score for (own, _), score in scores.items() if own == name]
        bits = [score.nats.sum() / (math.log(2) * num_bytes) for score in found]
        kls = [score.kl.sum() / num_tokens for score in found]
        regained = f"{_regained(scores, name, 'nats')} | {_regained(scores, name, 'kl')}" if "QAT" in name else " | "
        yield (
            f"| {name} | {' / '.join(f'{x:.4f}' for x in bits)} | {statistics.mean(bits):.4f} | "
            f"{' / '.join(f'{x:.5f}' for x in kls)} | {statistics.mean(kls):.5f} | {regained} |"
        )
    yield ""
    yield "Doubts: a student of 0.8M parameters that has read half a million tokens loses little by rounding; bits per"
    yield "byte move more by the tokens that are trained on than by rounding, KL from the merged student does not."


if __name__ == "__main__":
    main()
