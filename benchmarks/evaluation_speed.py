"""lm-eval's multiple-choice tasks through our model and through the harness' own `hf`: same scores, time side by side.

    mobilellm-pro fetch-evaluation outputs/debug/evaluation_data
    python benchmarks/evaluation_speed.py
    python benchmarks/evaluation_speed.py --size 30m      # with a vocabulary of 4,096

A student with random weights, exported and loaded by both; tasks of real documents, several answers to a question. Both
get the same requests, turn by turn; times are of answering only, not of loading or of building prompts. The 100m has
the vocabulary of the 1b, and needs its tokenizer: `pip install --no-deps llama-models==0.3.0`.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from machine import ROOT, describe
from safetensors.torch import save_file

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.convert.conversion import write_description
from mobilellm_pro.evaluation.harness_model import CheckpointModel
from mobilellm_pro.evaluation.local_datasets import local_datasets
from mobilellm_pro.model.checkpoint import LoadedModel
from mobilellm_pro.model.hugging_face import hugging_face_name
from mobilellm_pro.model.student import FLAVORS, Student

TASKS = ("openbookqa", "piqa", "social_iqa", "boolq")
SIZES = {
    "debug": FLAVORS["debug"],
    "100m": FLAVORS["100m"],
    "30m": replace(
        FLAVORS["1b"], vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=2, sliding_window=128, global_layers=(0, 4, 8, 11),
    ),
}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "outputs/debug/evaluation_data")
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--limit", type=int, default=48, help="documents of each task")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="of `hf`")
    parser.add_argument("--write", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    packages = ["torch", "transformers", "lm-eval"]
    lines = ["# Evaluation beside lm-eval's hf model", "", *describe(packages, torch.get_num_threads()), ""]
    lines += ["| task | shots | requests | hf s | ours s | hf / ours, each round | largest difference |"]
    lines += ["|---|---:|---:|---:|---:|---|---:|"]
    manager = TaskManager()
    with tempfile.TemporaryDirectory() as folder, local_datasets(arguments.data):
        write_student(Path(folder), arguments.size)
        models = (
            Timed(HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=arguments.batch_size)),
            Timed(CheckpointModel(folder, dtype="float32", device="cpu")),
        )
        for shots in arguments.shots:
            for task in TASKS:
                lines.append(row(task, shots, models, arguments, manager))
                print(lines[-1], flush=True)
    settings = f"Size {arguments.size}, float32, {torch.get_num_threads()} threads"
    rows = f"`hf` with rows of {arguments.batch_size}, the first {arguments.limit} documents"
    lines += ["", f"{settings}; {rows}, median of {arguments.rounds} rounds."]
    lines += [
        "",
        "Doubts: random weights; a small model, of which the harness' own work is a larger part. Where answers are",
    ]
    lines += ["of one token (BoolQ), `hf` as well computes a question once, but it makes the logits of all its tokens."]
    if arguments.write:
        write_atomically(arguments.write, "\n".join(lines) + "\n")
    print("\n".join(lines))


class Timed:
    """A model of the harness, the seconds that it takes for an answer, and the answers."""

    def __init__(self, model: Any) -> None:
        self.model, self.seconds, self.answers = model, 0.0, []
        answer = model._loglikelihood_tokens

        def timed(requests: Any, **options: Any) -> Any:
            start = time.perf_counter()
            self.answers = answer(requests, **options)
            self.seconds = time.perf_counter() - start
            return self.answers

        model._loglikelihood_tokens = timed


def row(task: str, shots: int, models: tuple[Timed, Timed], arguments: argparse.Namespace, manager: TaskManager) -> str:
    """A line of the table."""
    seconds: list[tuple[float, float]] = []
    for _ in range(arguments.rounds):
        results = [
            simple_evaluate(
                timed.model, tasks=[task], num_fewshot=shots, limit=arguments.limit, task_manager=manager,
                bootstrap_iters=0, log_samples=False,
            )["results"]
            for timed in models
        ]  # fmt: skip
        assert results[0] == results[1], "the scores differ"
        seconds.append((models[0].seconds, models[1].seconds))
    hf, ours = (statistics.median(values) for values in zip(*seconds, strict=True))
    pairs = list(zip(models[0].answers, models[1].answers, strict=True))
    off = max(abs(a[0] - b[0]) for a, b in pairs)
    ratios = " ".join(f"{a / b:.2f}" for a, b in seconds)
    return f"| {task} | {shots} | {len(pairs)} | {hf:.2f} | {ours:.2f} | {ratios} | {off:.1e} |"


def write_student(folder: Path, size: str) -> None:
    """A Hugging Face folder with random weights and the tests' tokenizer."""
    torch.manual_seed(0)
    student = Student(SIZES[size])
    student.init_weights()
    tokenizer = "llama4" if size == "100m" else str(ROOT / "tests/assets/debug_tokenizer.model")
    write_description(LoadedModel(student, tokenizer, 2048), folder, "float32")
    tensors = {hugging_face_name(name): tensor for name, tensor in student.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
