"""Time, memory and gradient error of full-vocabulary distillation losses, side by side: ours, plain torch, and peers.

    python benchmarks/kl_loss.py --tokens 256 1024 --dtypes bf16 fp32 --write FILE.md
    python benchmarks/kl_loss.py --measure memory --tokens 1024 16384 --candidates chunked
    python benchmarks/kl_loss.py --measure errors --tokens 64  # gradient error against fp64
    python benchmarks/kl_loss.py --device cuda --tokens 16384 --candidates chunked triton plain

Peers are optional: pip install liger-kernel trl "torchtune==0.6.1" "torchao==0.9.0". One that cannot be imported is
reported as absent. Every measurement is a fresh process, and candidates take turns, so that memory is nobody else's
and a busy machine is busy for all. Time is a ratio to the floor: the four products that cannot be avoided (student
logits, teacher logits, gradients of hidden states and head) by `torch.mm` into given memory, at our chunk size (or that
of --floor-chunk), half of them measured before the candidate and half after it, in the same process. "Core time" is the
same ratio in seconds that the process spent on cores, which other programs on the machine disturb less.

Extra memory is the high-water mark of the resident set during one forward and backward, above inputs and gradients in
the dtype of the inputs. "+fp32" is how much of it is the fp32 sum of the head's gradient.

Shape suffixes: T tokens, V vocabulary, D student width, E teacher width.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import ROOT, describe
from torch import Tensor

sys.path.append(str(ROOT / "tests/losses"))

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


def measure(name: str, tokens: int, job: argparse.Namespace) -> dict[str, float]:
    """One forward and backward of one candidate, in this process: seconds, MiB, and seconds of the floor."""
    from mobilellm_pro.losses.problem import checked_problem
    from mobilellm_pro.losses.token_chunks import chunk_size

    run, dtype = CANDIDATES[name](), DTYPES[job.dtype]
    # Imports, compilation and thread pools are not what is measured; this is far too small to leave memory behind.
    small = make_inputs(min(tokens, 32), 512, job.widths, dtype, job.device, near=False)
    run(*small).backward()
    inputs = make_inputs(tokens, job.vocabulary, job.widths, dtype, job.device, near=False)
    settings = {"token_weights": None, "kl_weight": 1, "ce_weight": 0, "temperature": 1, "chunk_tokens": None}
    problem = checked_problem(*inputs, None, **settings, vocab_group=None, fp32_logits=False)
    chunk_tokens = job.floor_chunk or chunk_size(problem, tokens)
    # Half of the tokens before and half after, in whole chunks; none where time is not asked for.
    part = math.ceil(tokens / 2 / chunk_tokens) * chunk_tokens if job.measure == "time" else 0
    floor = floor_seconds(inputs, chunk_tokens, part)
    reset_peak(job.device)
    before = memory_bytes(job.device, peak=False)
    begin = clock(inputs[0])
    run(*inputs).backward()
    seconds = clock(inputs[0]) - begin
    outputs = sum(x.numel() * x.element_size() for x in inputs[:2])
    extra = memory_bytes(job.device, peak=True) - before - outputs
    for x in inputs[:2]:
        x.grad = None
    floor = (floor + floor_seconds(inputs, chunk_tokens, part)) * tokens / max(1, 2 * min(part, tokens))
    own_chunk = chunk_size(dataclasses.replace(problem, fp32_logits=name == "chunked fp32 logits"), tokens)
    sums = inputs[1].numel() * 2 if name.startswith("chunked") and job.dtype == "bf16" and tokens > own_chunk else 0
    sizes = {"chunk": chunk_tokens, "extra": extra / 2**20, "fp32": sums / 2**20}
    ratio, core_ratio = (seconds / floor).tolist() if part else (math.nan, math.nan)
    return {"seconds": seconds[0].item(), "ratio": ratio, "core_ratio": core_ratio, **sizes}


def errors(name: str, tokens: int, job: argparse.Namespace) -> dict[str, float]:
    """Relative error of both gradients against fp64, for a random student and for one within 1 % of its teacher."""
    out = {}
    for label, near in (("random", False), ("near", True)):
        inputs = make_inputs(tokens, job.vocabulary, job.widths, DTYPES[job.dtype], job.device, near)
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


def in_process(name: str, tokens: int, dtype: str, options: argparse.Namespace) -> dict[str, float] | str:
    """A measurement in a fresh process, or why there is none."""
    job = {k: getattr(options, k) for k in ("measure", "device", "vocabulary", "widths", "floor_chunk")}
    job |= {"name": name, "tokens": tokens, "dtype": dtype}
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith('{"')]
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:120]
    return json.loads(lines[-1])


# Of each kind of measurement: the columns of its table.
COLUMNS = {
    "time": "time / floor (least, most) | core time / floor (least, most) | seconds | extra MiB | +fp32",
    "memory": "extra MiB | +fp32",
    "errors": "hidden, random | head, random | hidden, near | head, near",
}


def table(options: argparse.Namespace, tokens: int, dtype: str) -> list[str]:
    """Measure all candidates in turn; lines of a Markdown table."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.candidates}
    failures: dict[str, str] = {}
    for _ in range(options.repeats):
        for name in options.candidates:
            if name in failures or (name == "chunked fp32 logits" and dtype == "fp32"):
                continue
            result = in_process(name, tokens, dtype, options)
            print(f"{dtype} T={tokens} {name}: {result}", file=sys.stderr, flush=True)
            if isinstance(result, str):
                failures[name] = result
            else:
                results[name].append(result)
    rows = [f"| {name} | {' | '.join(cells(options.measure, r))} |" for name, r in results.items() if r]
    rows += [f"| {name} | no result: {why} |" for name, why in failures.items()]
    head = COLUMNS[options.measure]
    chunk = next((f", floor in chunks of {r[0]['chunk']:.0f}" for r in results.values() if r and "chunk" in r[0]), "")
    return [f"\n{dtype}, T = {tokens}{chunk}\n", f"| | {head} |", "|---" * (head.count("|") + 2) + "|", *rows]


def cells(measure: str, results: list[dict[str, float]]) -> list[str]:
    """One candidate's row, without its name."""
    if measure == "errors":
        return [f"{results[0][f'{what}_{how}']:.1e}" for how in ("random", "near") for what in ("hidden", "head")]
    fp32 = results[0]["fp32"]
    memory = [f"{max(r['extra'] for r in results) - fp32:.0f}", f"{fp32:.0f}"]
    if measure == "memory":
        return memory
    spreads = []
    for key in ("ratio", "core_ratio"):
        ratios = sorted(r[key] for r in results)
        spreads.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})")
    return [*spreads, f"{statistics.median(r['seconds'] for r in results):.1f}", *memory]


def worker(text: str) -> None:
    """One measurement, printed as JSON."""
    job = argparse.Namespace(**json.loads(text))
    print(json.dumps((errors if job.measure == "errors" else measure)(job.name, job.tokens, job)))


def main() -> None:
    """Entry point; `--worker` runs one measurement."""
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=COLUMNS, default="time")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=[x for x in CANDIDATES if x != "triton"])
    parser.add_argument("--vocabulary", type=int, default=202048)
    parser.add_argument("--widths", type=int, nargs=2, default=[1280, 5120], help="student and teacher")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--floor-chunk", type=int, help="tokens of a chunk of the floor (default: as ours)")
    parser.add_argument("--write", type=Path, help="append the tables to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    lines = describe(["torch", "liger-kernel", "torchtune", "torchao", "trl", "triton"], options.threads)
    for dtype in options.dtypes:
        for tokens in options.tokens:
            lines += table(options, tokens, dtype)
    print("\n".join(lines))
    if options.write:
        with options.write.open("a") as file:
            file.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
