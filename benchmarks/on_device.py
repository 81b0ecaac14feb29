"""The student on this machine's processor: the exported program beside eager torch, and beside all-global attention.

    python benchmarks/on_device.py --write benchmarks/results/on_device_<hardware>_<yyyymm>.md
    python benchmarks/on_device.py --flavor debug --prompts 64 128 --new-tokens 8     # a minute or two

export   random integers and scales in the architecture, drawn directly; `export_executorch` writes, runs and compares
         both programs: three local layers to a global one, and all layers global. Bytes of the files, seconds, peak
speed    for each prompt: seconds to take it in, tokens a second of a greedy continuation after it, bytes of keys and
         values, resident memory; each cell in a process of its own, forms in turns within a prompt

Numbers do not matter for speed or size, so nothing is trained. Eager models are the student in full precision, with a
KV cache in its type; prompts go in in chunks of a window, as on the device. bfloat16 is measured only where asked for:
on processors without products of that type torch takes minutes for what takes it seconds in float32. The bars: files of
at most 611 MB in all, export within 8 GB.
"""

import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from machine import MIB, ROOT, describe, section_parser, write_sections
from torch import Tensor

import mobilellm_pro.config  # noqa: F401  (before torchtitan)
from mobilellm_pro.convert.executorch_decoder import ring_slots
from mobilellm_pro.convert.executorch_export import export_executorch
from mobilellm_pro.convert.executorch_runtime import DeviceProgram
from mobilellm_pro.convert.quantized_model import QuantizedModel, norm_shapes, weight_shapes
from mobilellm_pro.model.kv_cache import KVCache
from mobilellm_pro.model.student import FLAVORS, Student, StudentArgs
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight
from mobilellm_pro.quantization.scheme import SCHEMES

SECTIONS = ("export", "speed")
FORMS = ("program", "program, all global", "float32", "float32, all global", "bfloat16")


def main() -> None:
    """Command line."""
    parser = section_parser(__doc__, SECTIONS)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/on_device", help="of programs, kept afterwards")
    parser.add_argument("--flavor", default="1b", choices=list(FLAVORS))
    parser.add_argument("--layers", type=int, help="only the first so many")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 4096, 8192], help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[form for form in FORMS if form != "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", choices=FORMS, help="one form, in this process")
    parser.add_argument("--prompt", type=int, help="with --measure: the cell; without it, the form is exported")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(export_one(arguments) if arguments.prompt is None else cell(arguments)))
        return
    head = ["# On device", "", *describe(["torch", "executorch", "torchao"], arguments.threads)]
    sections = {"export": partial(export, arguments), "speed": partial(speed, arguments)}
    write_sections(head, {name: sections[name] for name in arguments.only}, arguments.write)


def architecture(arguments: Namespace) -> StudentArgs:
    """That of the measured form, cut to the layers that are asked for."""
    args = FLAVORS[arguments.flavor]
    count = arguments.layers or args.num_hidden_layers
    wanted = range(count) if arguments.measure.endswith("all global") else args.global_layers
    return replace(args, num_hidden_layers=count, global_layers=tuple(layer for layer in wanted if layer < count))


def room(arguments: Namespace) -> int:
    """Tokens that a program is exported for."""
    return max(arguments.prompts) + arguments.new_tokens


def random_model(args: StudentArgs, max_tokens: int) -> QuantizedModel:
    """Integers of all sixteen values, scales that keep activations finite."""
    scheme, generator = SCHEMES["cpu"], torch.Generator().manual_seed(0)
    weights = {}
    for name, (rows, columns) in weight_shapes(args, scheme).items():
        integers = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
        scales = torch.rand(rows, columns // scheme.weights.group_of(columns, name), generator=generator) + 0.5
        weights[name] = QuantizedWeight(integers, (scales / 4.6 / math.sqrt(columns)).bfloat16())
    norms = {name: torch.ones(shape) for name, shape in norm_shapes(args).items()}
    return QuantizedModel(args, "cpu", scheme, weights, norms, "", max_tokens, trained=False)


def program_folder(arguments: Namespace) -> Path:
    """Of the measured form."""
    return arguments.folder / arguments.measure.replace(", ", "_").replace(" ", "_")


def export_one(arguments: Namespace) -> dict:
    """Writes, runs and compares a program."""
    model = random_model(architecture(arguments), room(arguments))
    report = export_executorch(model, program_folder(arguments), max_tokens=room(arguments), overwrite=True)
    return asdict(report)


def export(arguments: Namespace) -> list[str]:
    """The table of both programs."""
    rows = [
        "| form | .pte MB | .ptd MB | KV cache MiB | lower and write s | run and compare s | peak GB | greedy tokens | "
        "ties | largest difference of logits |",
        "|---|" + "---:|" * 9,
    ]
    bytes_in_all = {}
    for form in arguments.forms:
        if not form.startswith("program"):
            continue
        record = in_a_process(arguments, form)
        compared = record["comparison"]
        bytes_in_all[form] = record["program_bytes"] + record["data_bytes"]
        rows.append(
            f"| {form} | {record['program_bytes'] / 1e6:.2f} | {record['data_bytes'] / 1e6:.1f} | "
            f"{record['cache_bytes'] / MIB:.2f} | {record['lowering_seconds']:.0f} | "
            f"{record['comparison_seconds']:.0f} | {record['peak_bytes'] / 1e9:.2f} | {compared['num_tokens']} | "
            f"{compared['num_ties']} | {compared['largest_difference']:.1e} std |"
        )
    return [
        f"Flavor {arguments.flavor}, {arguments.layers or 'all'} layers, room for {room(arguments):,} tokens; KV cache "
        "with its ranges.",
        "",
        *rows,
        "",
        *(f"{form}: {total / 1e6:.2f} MB in all (bar for the 1B: 611)." for form, total in bytes_in_all.items()),
    ]


def speed(arguments: Namespace) -> list[str]:
    """The table of all cells."""
    rows = [
        "| prompt | form | prefill s | decode tokens/s | KV payload MiB | KV ranges MiB | load s | resident MB | "
        "peak MB | before loading MB |",
        "|---:|---|" + "---:|" * 8,
    ]
    for prompt in arguments.prompts:
        for form in arguments.forms:
            record = in_a_process(arguments, form, prompt)
            rows.append(
                f"| {prompt:,} | {form} | {record['prefill_seconds']:.2f} | {record['decode_per_second']:.2f} | "
                f"{record['payload_bytes'] / MIB:.2f} | {record['range_bytes'] / MIB:.2f} | "
                f"{record['load_seconds']:.1f} | {record['resident_bytes'] / 1e6:.0f} | "
                f"{record['peak_bytes'] / 1e6:.0f} | {record['before_bytes'] / 1e6:.0f} |"
            )
            print(rows[-1], flush=True)
    return [
        f"Flavor {arguments.flavor}, {arguments.layers or 'all'} layers; {arguments.new_tokens} tokens after each "
        "prompt. Keys and values of prompt and continuation; resident memory, shared and file pages included, after "
        "the last token, the most that it was, and what Python and torch took before the model was loaded.",
        "",
        *rows,
        "",
        "Doubts: one run of each cell, and the load average below says what else ran; the weights are random.",
    ]


def in_a_process(arguments: Namespace, form: str, prompt: int | None = None) -> dict:
    """What `--measure` prints."""
    command = [sys.executable, __file__, "--measure", form, "--folder", str(arguments.folder)]
    command += ["--flavor", arguments.flavor, "--new-tokens", str(arguments.new_tokens)]
    command += ["--prompts", *map(str, arguments.prompts), "--threads", str(arguments.threads)]
    command += [] if arguments.layers is None else ["--layers", str(arguments.layers)]
    command += [] if prompt is None else ["--prompt", str(prompt)]
    job = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(job.stdout.splitlines()[-1])


@torch.inference_mode()
def cell(arguments: Namespace) -> dict[str, float]:
    """One form with one prompt."""
    torch.set_num_threads(arguments.threads)
    args = architecture(arguments)
    prompt = torch.randint(args.vocab_size, (arguments.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    before = memory()["VmRSS"]
    begin = time.perf_counter()
    runner = ProgramRunner(arguments) if arguments.measure.startswith("program") else EagerRunner(arguments, args)
    loaded = time.perf_counter()
    logits = runner.extend(prompt)
    taken_in = time.perf_counter()
    for _ in range(arguments.new_tokens):
        logits = runner.extend([int(logits.argmax())])
    decoded = time.perf_counter() - taken_in
    payload, ranges = runner.cache_bytes(args, arguments.prompt + arguments.new_tokens)
    return {
        "load_seconds": loaded - begin,
        "prefill_seconds": taken_in - loaded,
        "decode_per_second": arguments.new_tokens / decoded,
        "payload_bytes": payload,
        "range_bytes": ranges,
        "resident_bytes": memory()["VmRSS"],
        "peak_bytes": memory()["VmHWM"],
        "before_bytes": before,
    }


def memory() -> dict[str, int]:
    """Bytes of this process, by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


class ProgramRunner:
    """The exported program."""

    def __init__(self, arguments: Namespace) -> None:
        self.program = DeviceProgram(program_folder(arguments), arguments.threads)

    def extend(self, tokens: list[int]) -> Tensor:
        """Tokens -> logits after the last, [V]."""
        return self.program.extend(tokens)

    def cache_bytes(self, args: StudentArgs, num_tokens: int) -> tuple[int, int]:
        """Numbers, and their ranges of 8 bytes a head, that this many tokens fill; a program has room for more."""
        global_slots = len(args.global_layers) * num_tokens
        local_slots = (args.num_hidden_layers - len(args.global_layers)) * ring_slots(args, num_tokens)
        heads = 2 * args.num_key_value_heads * (global_slots + local_slots)
        return heads * args.head_dim, heads * 8


class EagerRunner:
    """The student in torch."""

    def __init__(self, arguments: Namespace, args: StudentArgs) -> None:
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, arguments.measure.partition(",")[0]))
        self.model = Student(args).eval()
        torch.set_default_dtype(default)
        for parameter in self.model.parameters():
            if parameter.ndim == 2:
                parameter.uniform_(-1, 1).div_(math.sqrt(parameter.shape[1]))
        self.chunk = args.sliding_window
        self.cache = KVCache(arguments.prompt + arguments.new_tokens, "model")

    def extend(self, tokens: list[int]) -> Tensor:
        """Tokens -> logits after the last, [V]."""
        logits = torch.empty(0)
        for chunk in torch.tensor([tokens]).split(self.chunk, dim=1):
            logits = self.model(chunk, cache=self.cache, head=_last)
        return logits[0]

    def cache_bytes(self, args: StudentArgs, num_tokens: int) -> tuple[int, int]:
        """Numbers, and no ranges."""
        return self.cache.payload_bytes, self.cache.scale_bytes


def _last(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(hidden[:, -1], weight)


if __name__ == "__main__":
    main()
