"""Bytes on disk of everything that a 1B student is exported to, beside the arithmetic.

    python benchmarks/export_sizes.py --write benchmarks/results/export_sizes_<hardware>_<yyyymm>.md

Random numbers in the 1B architecture: sizes do not depend on them. Each folder is written by the function that the
export uses, in a process of its own, read back where there is a reader, compared with what was written, and removed
before the next. Bytes are those of model*.safetensors; the tokenizer beside them is the debug one and is left out.
`--only load` also has stock transformers load the torchao folders and compares a few logits with eager PyTorch.
Files of the ExecuTorch program are measured by `benchmarks/on_device.py`.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from machine import ROOT, describe, section_parser, write_sections

import mobilellm_pro.config  # noqa: F401  (before torchtitan)
from mobilellm_pro.convert.conversion import write_computed_safetensors
from mobilellm_pro.convert.export_sizes import ExportBytes, packed_bytes, plain_bytes, torchao_bytes
from mobilellm_pro.convert.packed_folder import read_packed, write_packed
from mobilellm_pro.convert.quantized_model import QuantizedModel, norm_shapes, student_on_meta, weight_shapes
from mobilellm_pro.convert.torchao_folder import check_torchao, write_torchao
from mobilellm_pro.model.hugging_face import hugging_face_name
from mobilellm_pro.model.stored_parameters import ParameterKind
from mobilellm_pro.model.student import FLAVORS
from mobilellm_pro.quantization.quantized_weight import QuantizedWeight
from mobilellm_pro.quantization.scheme import SCHEMES, WeightScheme

TOKENIZER = ROOT / "tests/assets/debug_tokenizer.model"
FORMS = ("bfloat16", "packed cpu", "packed accelerator", "torchao cpu", "torchao accelerator")
SECTIONS = ("sizes", "load")


def main() -> None:
    """Command line."""
    parser = section_parser(__doc__, SECTIONS)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/export_sizes", help="removed afterwards")
    parser.add_argument("--flavor", default="1b", choices=list(FLAVORS))
    parser.add_argument("--measure", choices=FORMS, help="one form, in this process")
    parser.add_argument("--check", action="store_true", help="with --measure: load it with transformers")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    sections = {"sizes": partial(sizes, arguments), "load": partial(load, arguments)}
    head = ["# Sizes of exports", "", *describe(["torch", "safetensors", "torchao", "transformers"])]
    write_sections(head, {name: sections[name] for name in arguments.only}, arguments.write)


def random_model(flavor: str, scheme_name: str) -> QuantizedModel:
    """Integers of all sixteen values, scales that keep activations finite."""
    args, scheme = FLAVORS[flavor], SCHEMES[scheme_name]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, (rows, columns) in weight_shapes(args, scheme).items():
        integers = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
        groups = columns // scheme.weights.group_of(columns)
        scales = torch.rand(rows, groups, generator=generator) * 2 / 4.6 / math.sqrt(columns)
        weights[name] = QuantizedWeight(integers, scales.bfloat16())
    norms = {name: torch.ones(shape) for name, shape in norm_shapes(args).items()}
    return QuantizedModel(args, scheme_name, scheme, weights, norms, str(TOKENIZER), 2048, trained=False)


def measure(arguments: Namespace) -> dict[str, float]:
    """Writes one form, reads it back, removes it."""
    form, folder = arguments.measure, arguments.folder / arguments.measure.replace(" ", "_")
    record: dict[str, float] = {}
    try:
        if form == "bfloat16":
            begin = time.perf_counter()
            folder.mkdir(parents=True)
            _write_plain(arguments.flavor, folder)
        else:
            kind, scheme_name = form.split()
            model = random_model(arguments.flavor, scheme_name)
            begin = time.perf_counter()
            (write_packed if kind == "packed" else write_torchao)(model, folder)
        record["write_seconds"] = time.perf_counter() - begin
        record["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if form.startswith("packed"):
            begin = time.perf_counter()
            read = read_packed(folder)
            record["read_seconds"] = time.perf_counter() - begin
            record["equal"] = float(all(map(torch.equal, _tensors(model), _tensors(read))))
        if arguments.check:
            begin = time.perf_counter()
            tokens = torch.randint(0, model.args.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
            record |= check_torchao(folder, model, tokens)._asdict()
            record["check_seconds"] = time.perf_counter() - begin
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    status = Path("/proc/self/status").read_text().splitlines()
    record["peak_bytes"] = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return record


def _tensors(model: QuantizedModel) -> Iterator[torch.Tensor]:
    for weight in model.weights.values():
        yield from weight
    yield from model.norms.values()


def _write_plain(flavor: str, folder: Path) -> None:
    shapes = {hugging_face_name(n): tuple(p.shape) for n, p in student_on_meta(FLAVORS[flavor]).named_parameters()}
    kinds = {name: ParameterKind(shape, torch.bfloat16) for name, shape in shapes.items()}
    write_computed_safetensors(kinds, lambda name: torch.randn(shapes[name]).bfloat16(), folder)


def computed(form: str, flavor: str) -> ExportBytes:
    """The arithmetic of a form."""
    if form == "bfloat16":
        return plain_bytes(FLAVORS[flavor], torch.bfloat16)
    kind, scheme_name = form.split()
    return (packed_bytes if kind == "packed" else torchao_bytes)(FLAVORS[flavor], SCHEMES[scheme_name])


def sizes(arguments: Namespace) -> list[str]:
    """The table of all forms."""
    rows = [
        "| form | MB, file | MB, arithmetic | weights | scales | norms | header, bytes | write, s | peak, GiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    equal = []
    for form in FORMS:
        record, expected = _in_process(arguments, form), computed(form, arguments.flavor)
        parts = " | ".join(f"{part / 1e6:.1f}" for part in expected)
        rows.append(
            f"| {form} | **{record['bytes'] / 1e6:.1f}** | {expected.total / 1e6:.1f} | {parts} | "
            f"{record['bytes'] - expected.total:,.0f} | {record['write_seconds']:.0f} | "
            f"{record['peak_bytes'] / 2**30:.1f} |"
        )
        if "equal" in record:
            assert record["equal"] == 1.0, form
            equal.append(f"{form} in {record['read_seconds']:.0f} s")
    rows_of_table = packed_bytes(FLAVORS[arguments.flavor], SCHEMES["cpu"], WeightScheme(group=None))
    parts = " | ".join(f"{part / 1e6:.1f}" for part in rows_of_table)
    rows.append(
        f"| cpu, a range for each embedding row | not written | {rows_of_table.total / 1e6:.1f} | {parts} | | | |"
    )
    return [
        *rows,
        "",
        f"Read back equal to the bit: {', '.join(equal)}. What a file has more than arithmetic is its header, the "
        "names and places of tensors. Weights of packed forms are two integers a byte, of torchao's one; scales are "
        "bfloat16 (torchao's: and a byte of zero point), norms float32 (bfloat16 in the first row). The last row is a "
        "composition that no scheme asks for: a range for each row of the embedding, groups of 32 in linear layers.",
        "",
        "Expected for the 1B were 2168.9 MB in bfloat16, 610.3 and 673.5 MB packed (the latter with norms in bfloat16) "
        "and 594 MB for the last row. The paper says 590 MB for its CPU model and 720 MB for the accelerator's, its "
        "figure for groups and one more embedding.",
        "",
        "Doubts: random numbers; times and peaks are of one run, beside other work on the same two cores. A peak is "
        "that of a process that also draws the numbers and, for packed forms, reads them back.",
    ]


def load(arguments: Namespace) -> list[str]:
    """The folders that stock transformers reads."""
    rows = [
        "| folder | seconds | from the same arithmetic | from training's | logits | same tokens | peak, GiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for form in FORMS:
        if form.startswith("torchao"):
            record = _in_process(arguments, form, "--check")
            rows.append(
                f"| {form} | {record['check_seconds']:.0f} | {record['arithmetic']:.2e} | {record['training']:.2e} | "
                f"{record['logits']:.2e} | {record['same_tokens']:.3f} | {record['peak_bytes'] / 2**30:.1f} |"
            )
    return [
        *rows,
        "",
        "`AutoModelForCausalLM.from_pretrained` loads the folder; integers, scales and norms are equal to the bit, or "
        "this would have stopped. Differences of logits, and logits, as root mean squares over 16 tokens. `Same "
        "arithmetic` rounds activations as integer kernels do and no keys and values; `training` is the paper's Eq. 3 "
        "and rounds both.",
    ]


def _in_process(arguments: Namespace, form: str, *words: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", form, "--flavor", arguments.flavor, "--folder"]
    done = subprocess.run([*command, str(arguments.folder), *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
