"""Time, memory and gradient error of full-vocabulary distillation losses, side by side: ours, plain torch, and peers.

    python benchmarks/kl_loss.py --tokens 256 1024 --dtypes bf16 fp32 --write FILE.md
    python benchmarks/kl_loss.py --errors                      # gradient error against fp64
    python benchmarks/kl_loss.py --device cuda --tokens 16384 --candidates chunked triton plain

Peers are optional: pip install liger-kernel trl "torchtune==0.6.1" "torchao==0.9.0". One that cannot be imported is
reported as absent. Every measurement is a fresh process, and candidates take turns, so that memory is nobody else's
and a busy machine is busy for all. Time is a ratio to the floor: the four products that cannot be avoided (student
logits, teacher logits, gradients of hidden states and head) by `torch.mm` into given memory, at our chunk size, half of
them measured before the candidate and half after it, in the same process. "Core time" is the same ratio in seconds that
the process spent on cores, which other programs on the machine disturb less.

Extra memory is the high-water mark of the resident set during one forward and backward, above inputs and gradients in
the dtype of the inputs. "+fp32" is how much of it is the fp32 sum of the head's gradient.

Shape suffixes: T tokens, V vocabulary, D student width, E teacher width.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "losses")]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(tokens: int, vocabulary: int, widths: list[int], dtype: torch.dtype, device: str, near: bool) -> Inputs:
    """Hidden states and heads, logits of standard deviation 2; `near`: the teacher's within 1 % of the student's."""
    torch.manual_seed(0)
    student_width, teacher_width = widths

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        for block in out.split(8192):
            block.copy_(torch.randn(block.shape, device=device) * scale)
        return out

    hidden_TD, head_VD = normal(tokens, student_width, 1), normal(vocabulary, student_width, 2 / student_width**0.5)
    teacher_TE, teacher_VE = normal(tokens, teacher_width, 1), normal(vocabulary, teacher_width, 2 / teacher_width**0.5)
    if near:
        teacher_TE[:, :student_width], teacher_TE[:, student_width:] = hidden_TD, 0
        teacher_VE[:, :student_width].mul_(0.01 * (teacher_width / student_width) ** 0.5).add_(head_VD)
    return hidden_TD.requires_grad_(), head_VD.requires_grad_(), teacher_TE, teacher_VE


def ours(**keywords: object) -> Callable[..., Tensor]:
    """Our loss with these keywords."""
    from mobilellm_pro.losses import linear_forward_kl

    return lambda *inputs: linear_forward_kl(*inputs, **keywords)


def plain() -> Callable[..., Tensor]:
    """Full logits, as the tests define plain torch."""
    from loss_definition import plain_torch

    return lambda *inputs: plain_torch(*inputs, torch.ones(inputs[0].shape[0], device=inputs[0].device))


def liger() -> Callable[..., Tensor]:
    """The package's fused linear JSD at beta 0, which is the forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    return lambda h, w, th, tw: loss(h, w, th, tw, torch.zeros(len(h), dtype=torch.int64, device=h.device)) * len(h)


def torchtune() -> Callable[..., Tensor]:
    """Chunked forward KL on logits that the caller makes chunk by chunk, teacher without gradient."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    loss = ForwardKLWithChunkedOutputLoss()

    def run(h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = [(c @ tw.T)[None] for c in th.chunk(8)]
        return loss([(c @ w.T)[None] for c in h.chunk(8)], teacher, torch.zeros(1, len(h), dtype=torch.int64)) * len(h)

    return run


def trl() -> Callable[..., Tensor]:
    """The distillation trainer's chunked divergence at beta 0."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def run(h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> Tensor:
        mask = torch.ones(1, len(h), dtype=torch.int64, device=h.device)
        return _chunked_divergence_loss(h[None], th[None], w, tw, mask, beta=0.0, num_items_in_batch=1)[0]

    return run


# The first three are ours; plain is torch with full logits; the others are named by their package.
CANDIDATES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "chunked": lambda: ours(impl="chunked"),
    "chunked fp32 logits": lambda: ours(impl="chunked", fp32_logits=True),
    "triton": lambda: ours(impl="triton"),
    "plain": plain,
    "liger": liger,
    "torchtune": torchtune,
    "trl": trl,
}


def floor_seconds(inputs: Inputs, chunk_tokens: int, tokens: int) -> Tensor:
    """Four products for the first `tokens` tokens in chunks, into memory that already exists."""
    hidden_TD, head_VD, teacher_TE, teacher_VE = (x.detach() for x in inputs)
    first = hidden_TD[:chunk_tokens]
    logits_CV, teacher_CV = (first.new_zeros(len(first), len(head_VD)) for _ in range(2))
    grad_hidden_CD, grad_head_VD = torch.zeros_like(first), torch.zeros_like(head_VD)
    begin = clock(hidden_TD)
    for i in range(0, tokens, chunk_tokens):
        h, t = hidden_TD[:tokens][i : i + chunk_tokens], teacher_TE[:tokens][i : i + chunk_tokens]
        z = torch.mm(h, head_VD.T, out=logits_CV[: len(h)])
        torch.mm(t, teacher_VE.T, out=teacher_CV[: len(h)])
        torch.mm(z, head_VD, out=grad_hidden_CD[: len(h)])
        torch.mm(z.T, h, out=grad_head_VD)
    return clock(hidden_TD) - begin


def clock(like: Tensor) -> Tensor:
    """[wall seconds, seconds of this process on any core], once the device has finished."""
    if like.is_cuda:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def memory_bytes(device: str, peak: bool) -> int:
    """Bytes held now, or the most since `reset_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    field = "VmHWM" if peak else "VmRSS"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak(device: str) -> None:
    """Start a new high-water mark."""
    torch.cuda.reset_peak_memory_stats() if device == "cuda" else Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, tokens: int, vocabulary: int, widths: list[int], dtype: str, device: str) -> dict[str, float]:
    """One forward and backward of one candidate, in this process: seconds, floor seconds, MiB."""
    from mobilellm_pro.losses.problem import checked_problem
    from mobilellm_pro.losses.token_chunks import chunk_size

    run = CANDIDATES[name]()
    # Imports, compilation and thread pools are not what is measured; this is far too small to leave memory behind.
    small = make_inputs(min(tokens, 32), 512, widths, DTYPES[dtype], device, near=False)
    run(*small).backward()
    inputs = make_inputs(tokens, vocabulary, widths, DTYPES[dtype], device, near=False)
    settings = {"token_weights": None, "kl_weight": 1, "ce_weight": 0, "temperature": 1, "chunk_tokens": None}
    problem = checked_problem(*inputs, None, **settings, vocab_group=None, fp32_logits=False)
    chunk_tokens = chunk_size(problem, tokens)
    # Half of the tokens before and half after, in whole chunks.
    part = math.ceil(tokens / 2 / chunk_tokens) * chunk_tokens
    floor = floor_seconds(inputs, chunk_tokens, part)
    reset_peak(device)
    before = memory_bytes(device, peak=False)
    begin = clock(inputs[0])
    run(*inputs).backward()
    seconds = clock(inputs[0]) - begin
    outputs = sum(x.numel() * x.element_size() for x in inputs[:2])
    extra = memory_bytes(device, peak=True) - before - outputs
    for x in inputs[:2]:
        x.grad = None
    floor = (floor + floor_seconds(inputs, chunk_tokens, part)) * tokens / (2 * min(part, tokens))
    own_chunk = chunk_size(dataclasses.replace(problem, fp32_logits=name == "chunked fp32 logits"), tokens)
    sums = inputs[1].numel() * 2 if name.startswith("chunked") and dtype == "bf16" and tokens > own_chunk else 0
    ratio, core_ratio = (seconds / floor).tolist()
    sizes = {"chunk": chunk_tokens, "extra": extra / 2**20, "fp32": sums / 2**20}
    return {"seconds": seconds[0].item(), "ratio": ratio, "core_ratio": core_ratio, **sizes}


def errors(name: str, tokens: int, vocabulary: int, widths: list[int], dtype: str, device: str) -> dict[str, float]:
    """Relative error of both gradients against fp64, for a random student and for one within 1 % of its teacher."""
    out = {}
    for label, near in (("random", False), ("near", True)):
        inputs = make_inputs(tokens, vocabulary, widths, DTYPES[dtype], device, near)
        CANDIDATES[name]()(*inputs).backward()
        hidden, head, teacher_hidden, teacher_head = (x.detach() for x in inputs)
        z = torch.cat([hidden.double() @ w.double().T for w in head.split(8192)], 1)
        y = torch.cat([teacher_hidden.double() @ w.double().T for w in teacher_head.split(8192)], 1)
        gradient = z.softmax(-1) - y.softmax(-1)
        exact = sum(g @ w.double() for g, w in zip(gradient.split(8192, 1), head.split(8192), strict=True))
        out[f"hidden_{label}"] = ((inputs[0].grad.double() - exact).norm() / exact.norm()).item()
        squares = torch.zeros(2, dtype=torch.float64)
        for g, got in zip(gradient.split(8192, 1), inputs[1].grad.split(8192), strict=True):
            exact = g.T @ hidden.double()
            squares += torch.stack([(got.double() - exact).square().sum(), exact.square().sum()]).cpu()
        out[f"head_{label}"] = (squares[0] / squares[1]).sqrt().item()
    return out


def in_process(arguments: list[str]) -> dict[str, float] | str:
    """A measurement in a fresh process, or why there is none."""
    done = subprocess.run([sys.executable, __file__, "--worker", *arguments], capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith('{"')]
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:120]
    return json.loads(lines[-1])


def table(options: argparse.Namespace, tokens: int, dtype: str) -> list[str]:
    """Measure all candidates in turn; lines of a Markdown table."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.candidates}
    failures: dict[str, str] = {}
    for _ in range(options.repeats):
        for name in options.candidates:
            if name in failures or (name == "chunked fp32 logits" and dtype == "fp32"):
                continue
            kind = "errors" if options.errors else "time"
            sizes = [str(x) for x in (tokens, options.vocabulary, *options.widths)]
            result = in_process([name, kind, dtype, options.device, *sizes])
            print(f"{dtype} T={tokens} {name}: {result}", file=sys.stderr, flush=True)
            if isinstance(result, str):
                failures[name] = result
            else:
                results[name].append(result)
    rows = [error_row(n, r[0]) if options.errors else time_row(n, r) for n, r in results.items() if r]
    rows += [f"| {n} | no result: {why} |" for n, why in failures.items()]
    head = "hidden, random | head, random | hidden, near | head, near" if options.errors else TIME_COLUMNS
    chunk = next((f", chunks of {r[0]['chunk']:.0f}" for r in results.values() if r and "chunk" in r[0]), "")
    return [f"\n{dtype}, T = {tokens}{chunk}\n", f"| | {head} |", "|---" * (head.count("|") + 2) + "|", *rows]


TIME_COLUMNS = "time / floor (least, most) | core time / floor (least, most) | seconds | extra MiB | +fp32"


def time_row(name: str, results: list[dict[str, float]]) -> str:
    """One candidate's times and memory."""
    spreads = []
    for key in ("ratio", "core_ratio"):
        ratios = sorted(r[key] for r in results)
        spreads.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})")
    seconds, extra = statistics.median(r["seconds"] for r in results), max(r["extra"] for r in results)
    fp32 = results[0]["fp32"]
    return f"| {name} | {' | '.join(spreads)} | {seconds:.1f} | {extra - fp32:.0f} | {fp32:.0f} |"


def error_row(name: str, result: dict[str, float]) -> str:
    """One candidate's gradient errors."""
    cells = " | ".join(f"{result[f'{what}_{how}']:.1e}" for how in ("random", "near") for what in ("hidden", "head"))
    return f"| {name} | {cells} |"


def machine(threads: int) -> list[str]:
    """What a reader needs to know to repeat the run."""
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "?")
    versions = {x.metadata["Name"].replace("_", "-"): x.version for x in metadata.distributions()}
    names = [x for x in ("torch", "liger-kernel", "torchtune", "torchao", "trl", "triton") if x in versions]
    return [
        f"Command: `python benchmarks/kl_loss.py {' '.join(sys.argv[1:])}`",
        f"Machine: {cpu}, {threads} threads, {platform.platform()}, Python {platform.python_version()}",
        "Versions: " + ", ".join(f"{x} {versions[x]}" for x in names),
    ]


def main() -> None:
    """Entry point; `--worker` runs one measurement and prints it as JSON."""
    if sys.argv[1:2] == ["--worker"]:
        name, kind, dtype, device, tokens, vocabulary, *widths = sys.argv[2:]
        function = errors if kind == "errors" else measure
        print(json.dumps(function(name, int(tokens), int(vocabulary), [int(w) for w in widths], dtype, device)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=[x for x in CANDIDATES if x != "triton"])
    parser.add_argument("--vocabulary", type=int, default=202048)
    parser.add_argument("--widths", type=int, nargs=2, default=[1280, 5120], help="student and teacher")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--errors", action="store_true", help="gradient error instead of time and memory; use T = 64")
    parser.add_argument("--write", type=Path, help="append the tables to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    lines = machine(options.threads)
    for dtype in options.dtypes:
        for tokens in options.tokens:
            lines += table(options, tokens, dtype)
    print("\n".join(lines))
    if options.write:
        with options.write.open("a") as file:
            file.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
