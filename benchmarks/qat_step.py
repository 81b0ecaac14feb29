"""What fake quantization costs a step: the student at the 1B's width, distilled from itself, with and without.

    python benchmarks/qat_step.py                                        # CPU: two layers, a part of the vocabulary
    python benchmarks/qat_step.py --layers 30 --vocabulary 202048 --tokens 8192 --compile      # one H100

A step is the teacher's forward pass, the student's forward and backward pass with the loss over the whole vocabulary,
and AdamW. Ways take turns in one process, so that what disturbs one disturbs all; times are medians, and what counts is
their ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from machine import DEVICE, GPU, describe, synchronize

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.losses import linear_distillation
from mobilellm_pro.model.quantized_modules import StudentQuantization, quantize_modules
from mobilellm_pro.model.student import FLAVORS, Student, StudentArgs

DTYPE = torch.bfloat16 if GPU else torch.float32
BAR = 1.35


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="layers of all models")
    parser.add_argument("--write", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    args = replace(
        FLAVORS["1b"],
        num_hidden_layers=arguments.layers,
        vocab_size=arguments.vocabulary,
        global_layers=tuple(i for i in FLAVORS["1b"].global_layers if i < arguments.layers),
    )
    tokens = torch.randint(args.vocab_size, (1, arguments.tokens), device=DEVICE)
    steps = {name: _step(args, name, tokens, arguments.compile) for name in ("none", "cpu", "accelerator")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 1):
        for name, step in steps.items():
            synchronize()
            begin = time.perf_counter()
            step()
            synchronize()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    lines = list(_report(arguments, seconds))
    print("\n".join(lines))
    if arguments.write:
        write_atomically(arguments.write, "\n".join(lines) + "\n")


def _student(args: StudentArgs, compiled: bool) -> Student:
    torch.manual_seed(1)
    student = Student(args)
    student.init_weights()
    student.to(DEVICE, DTYPE)
    if compiled:
        for layer in student.layers.values():
            layer.compile(fullgraph=True)
    return student


def _step(args: StudentArgs, scheme: str, tokens: torch.Tensor, compiled: bool) -> Callable[[], None]:
    teacher, student = _student(args, compiled).requires_grad_(False), _student(args, False)
    if scheme != "none":
        quantize_modules(student, StudentQuantization(scheme, param_dtype=DTYPE))
    if compiled:
        for layer in student.layers.values():
            layer.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    labels = tokens.roll(-1)

    def step() -> None:
        with torch.no_grad():
            hidden = teacher(tokens, head=lambda hidden, weight: hidden)

        def head(own: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear_distillation(own, weight, hidden, teacher.embed_tokens.weight, labels).loss

        (student(tokens, head=head) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _report(arguments: argparse.Namespace, seconds: dict[str, list[float]]) -> Iterator[str]:
    yield "# A step with fake quantization beside the same step without"
    yield ""
    yield from describe(["torch", "triton"], torch.get_num_threads())
    yield ""
    kind = "compiled" if arguments.compile else "eager"
    yield f"{arguments.layers} layers of the 1B, {arguments.vocabulary:,} ids, {arguments.tokens:,} tokens, {DTYPE}, "
    yield f"{kind}; {arguments.repeats} steps of each in turn; the bar is {BAR}."
    yield ""
    yield "| scheme | median s | fastest s | ratio of medians | ratio of the fastest |"
    yield "|---|---:|---:|---:|---:|"
    plain = seconds["none"]
    for name, own in seconds.items():
        ratios = statistics.median(own) / statistics.median(plain), min(own) / min(plain)
        yield (f"| {name} | {statistics.median(own):.3f} | {min(own):.3f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
