"""The teacher: loading, forward pass, a step with its hidden states from a cache, and what FP8 costs.

    bash launch/quickstart.sh                                  # corpora and teacher of `step` and `float8`
    python benchmarks/teacher.py --write benchmarks/results/teacher_<hardware>_<yyyymm>.md
    python benchmarks/teacher.py --only forward --layers 12 --width 5120          # on a GPU: Scout's layers

load     a folder of sharded safetensors into one rank's shard: seconds, and growth of the resident peak in a fresh
         process; ours, torch's HuggingFaceStorageReader, and `from_pretrained` of transformers, in turns
forward  tokens a second and share of the speed of a square matrix product on the same device in the same run (and of
         989 TFLOP/s on a Hopper card); layer by layer compiled, and with FP8 weights
step     seconds of a training step: teacher live, hidden states read from a cache, cross entropy alone; with the time
         of the teacher's head product over the same tokens, which a cached step cannot avoid
options  a step of four micro-batches with and without `teacher.overlap` (an accelerator only) and FP8 weights
float8   KL from the teacher to itself with weights in FP8, and with cached hidden states in FP8, over held-out rows

Every row of a table comes from one run of the command, its variants in turns.
"""

import argparse
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from machine import DEVICE, GPU, ROOT, describe, in_folder, seconds, section_parser, write_sections
from teacher_steps import CONFIG, options, step
from torch import Tensor

from mobilellm_pro.config import load
from mobilellm_pro.data.hidden_state_files import CacheKey, decode, encode
from mobilellm_pro.losses import linear_distillation
from mobilellm_pro.model.attention_mask import PackedRows
from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.model.teacher import FLAVORS, Teacher, TeacherArgs
from mobilellm_pro.model.teacher_quantization import quantize_layer
from mobilellm_pro.model.teacher_sharding import compile_layers
from mobilellm_pro.training.loader import MixtureLoader, open_mixture
from tests.training.small_world import write_teacher

HOPPER_TFLOPS = 989.0


# load

PROGRAM = """
import sys, time, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
import torch
from mobilellm_pro.model.hugging_face import hugging_face_name, read_config, teacher_args
from mobilellm_pro.model.shard_loading import load_tensors
from mobilellm_pro.model.teacher import Teacher
from mobilellm_pro.model.teacher_layout import TeacherLayout, teacher_slices
how, folder, tensor, expert = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if how == "transformers":
    from transformers import Llama4ForCausalLM
def status(field):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
args = teacher_args(read_config(folder), folder)
layout = TeacherLayout(tensor * expert, 1, 1, tensor, expert, 1)
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    model = Teacher(args, layout.split)
Path("/proc/self/clear_refs").write_text("5")
before, begin = status("VmRSS"), time.perf_counter()
if how == "ours":
    model.to_empty(device="cpu")
    load_tensors(model, folder, slices=teacher_slices(args, layout, 0))
elif how == "torch":
    import torch.distributed.checkpoint as dcp
    model.to_empty(device="cpu")
    state = {hugging_face_name(k): v for k, v in model.state_dict().items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=True)
else:
    model = Llama4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
shard = sum(p.nbytes for p in model.parameters()) / 2**20
print(shard, (status("VmHWM") - before) / 1024, time.perf_counter() - begin)
"""


def load_folder(arguments: argparse.Namespace, work: Path) -> list[str]:
    """Loads a whole teacher, and the part of one rank of four."""
    args = replace(FLAVORS["debug"], hidden_size=1024, intermediate_size=1024, num_local_experts=16)
    args = replace(args, vocab_size=32_768, num_attention_heads=8, num_key_value_heads=4, head_dim=128)
    folder = work / "teacher"
    with torch.device("cpu"):
        write_teacher(Teacher(args).bfloat16(), folder)
    lines = ["| loader | what | shard MiB | growth of resident peak MiB | ratio | seconds |", "|---" * 6 + "|"]
    cases = [("ours", "1", "1"), ("torch", "1", "1"), ("transformers", "1", "1"), ("ours", "2", "2")]
    figures: dict[tuple[str, ...], list[list[float]]] = {case: [] for case in cases}
    for _ in range(arguments.repeats):
        for case in cases:
            command = [sys.executable, "-W", "ignore", "-c", PROGRAM, case[0], str(folder), *case[1:]]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            figures[case].append([float(word) for word in done.stdout.split()])
    for (how, tensor, expert), runs in figures.items():
        shard, peak, spent = (statistics.median(column) for column in zip(*runs, strict=True))
        what = "all" if tensor == "1" else f"1 of {tensor} tensor × {expert} expert ranks"
        lines.append(f"| {how} | {what} | {shard:,.0f} | {peak:,.0f} | {peak / shard:.2f} × | {spent:.2f} |")
    return lines


# forward


def forward(arguments: argparse.Namespace, work: Path) -> list[str]:
    """Random weights: the speed does not depend on them, but for the experts' shares, which are even."""
    dtype = torch.bfloat16 if GPU else torch.float32
    heads = arguments.width // 128
    args = TeacherArgs(
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 8 // 5,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 5),
    )
    args = args if GPU else replace(args, vocab_size=4096, num_local_experts=4)
    rows, seq_len = (8, 2048) if GPU else (2, 512)
    peak = matrix_product_tflops(dtype, arguments.repeats)
    with torch.device("meta"):
        whole = Teacher(args)
    body = args.get_nparams_and_flops(whole, seq_len)[1] / 3 - 2 * args.vocab_size * args.hidden_size
    parameters = sum(p.numel() for p in whole.parameters())
    shape = f"{arguments.layers} layers of width {arguments.width}, {parameters / 1e9:.2f}B parameters, {dtype}"
    lines = [
        f"{shape}; {rows} rows of {seq_len:,}. A square matrix product reaches {peak:.2f} TFLOP/s.", "",
        "| forward | tokens/s | TFLOP/s | of the matrix product |" + (" of 989 |" if GPU else ""),
        "|---|---|---|---|" + ("---|" if GPU else ""),
    ]  # fmt: skip
    for name in ("eager", "compiled", "float8 weights"):
        spent = forward_seconds(random_teacher(args, dtype), name, rows, seq_len, arguments.repeats)
        speed = rows * seq_len / spent
        tflops = speed * body / 1e12
        share = f" {tflops / HOPPER_TFLOPS:.1%} |" if GPU else ""
        lines.append(f"| {name} | {speed:,.0f} | {tflops:.3f} | {tflops / peak:.1%} |{share}")
    return lines


@torch.no_grad()
def forward_seconds(model: Teacher, how: str, rows: int, seq_len: int, repeats: int) -> float:
    """Of the layers, without the head."""
    tokens = torch.randint(0, model.model_args.vocab_size, (rows, seq_len), device=DEVICE)
    positions = torch.arange(seq_len, device=DEVICE).expand(tokens.shape)
    masks = PackedRows(torch.zeros_like(tokens)).masks(model.spans(), "causal")
    if how == "compiled":
        torch.compiler.set_stance("default")
        compile_layers(model)
    if how == "float8 weights":
        for layer in model.layers.values():
            quantize_layer(layer)
    return seconds(lambda: model(tokens, positions, masks, head=lambda hidden, weight: hidden), repeats)


def random_teacher(args: TeacherArgs, dtype: torch.dtype) -> Teacher:
    """On the device, never twice in memory."""
    with torch.device("meta"):
        model = Teacher(args).to(dtype)
    model.to_empty(device=DEVICE).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    return model.eval()


def matrix_product_tflops(dtype: torch.dtype, repeats: int) -> float:
    """Of [n, n] by [n, n]."""
    size = 8192 if GPU else 2048
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, repeats) / 1e12


# float8


@torch.no_grad()
def float8(arguments: argparse.Namespace, work: Path) -> list[str]:
    """Held-out rows of the debug corpora through the quickstart's teacher."""
    config = load(ROOT / CONFIG)
    model = load_model(ROOT / config.teacher.path, "float32").model
    mixture = open_mixture(config.data, "valid", config.training.seq_len)
    inputs, labels = next(iter(MixtureLoader(mixture, 32, 0, 1)))
    tokens, documents = inputs["input"], inputs["document_ids"]
    rows = PackedRows(documents)

    def hidden(teacher: torch.nn.Module) -> Tensor:
        return teacher(tokens, rows.positions, rows.masks(teacher.spans()), head=lambda hidden, weight: hidden)

    truth, head = hidden(model), model.lm_head.weight.clone()
    variants = {
        "bfloat16 hidden states": truth.bfloat16().float(),
        "float8 hidden states, a scale per token": through_float8(truth),
    }
    for layer in model.layers.values():
        quantize_layer(layer)
    variants["float8 weights, a scale per output channel"] = hidden(model)
    lines = ["| variant | KL from the teacher, nats a token | its cross entropy |", "|---|---|---|"]
    for name, states in {"float32": truth, **variants}.items():
        terms = linear_distillation(states, head, truth, head, labels, kl_weight=1.0, ce_weight=0.0)
        count = (labels != -100).sum()
        lines.append(f"| {name} | {float(terms.kl / count):.6f} | {float(terms.ce / count):.4f} |")
    return lines


def through_float8(hidden: Tensor) -> Tensor:
    """Hidden states as a cache gives them back."""
    decoded = torch.empty_like(hidden).flatten(0, 1)
    decode(*encode(hidden.flatten(0, 1), CacheKey("", "none", "float32", hidden.shape[-1], "float8")), decoded)
    return decoded.view_as(hidden)


SECTIONS = {"load": load_folder, "forward": forward, "step": step, "options": options, "float8": float8}


def main() -> None:
    """Command line."""
    parser = section_parser(__doc__, SECTIONS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12 if GPU else 4, help="of the teacher of `forward`")
    parser.add_argument("--width", type=int, default=5120 if GPU else 640, help="a multiple of 640")
    arguments = parser.parse_args()
    packages = ["torch", "torchtitan", "transformers", "safetensors", "torchao"]
    head = ["# The teacher", "", *describe(packages, torch.get_num_threads())]
    sections = {name: partial(in_folder, partial(SECTIONS[name], arguments)) for name in arguments.only}
    write_sections(head, sections, arguments.write)


if __name__ == "__main__":
    main()
