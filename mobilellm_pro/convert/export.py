"""The `export` verb: a checkpoint as files for phones, each run and compared before it counts.

mobilellm-pro export train_configs/debug/7_export.toml outputs/debug/4_qat_cpu FOLDER

packed/        int4 in safetensors, two integers a byte: what evaluations and other programs read
torchao/       `AutoModelForCausalLM.from_pretrained` of stock transformers with torchao
executorch/    model.pte and model.ptd: the program that runs on a phone's CPU; and its tokenizer
export.json    bytes, comparisons and settings, and sizes.md the same as a table
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.config import ConfigError, Problem, cpu_device
from mobilellm_pro.config.toml import read_toml
from mobilellm_pro.config.typed_values import check_table
from mobilellm_pro.convert.conversion import write_tokenizer
from mobilellm_pro.convert.export_sizes import packed_bytes, torchao_bytes
from mobilellm_pro.convert.packed_folder import read_packed, write_packed
from mobilellm_pro.convert.quantized_model import QuantizedModel, quantize_student
from mobilellm_pro.convert.unpacked_student import unpacked_student
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.model.quantized_modules import StudentQuantization, quantize_modules
from mobilellm_pro.model.student import Student

DONE, RECORD, TABLE = "DONE", "export.json", "sizes.md"
FormatName = Literal["packed", "torchao", "executorch"]
_PACKAGES = {"packed": (), "torchao": ("torchao", "transformers"), "executorch": ("executorch", "torchao")}
_PROMPT_TOKENS = 48


@dataclass
class SchemeTable:
    """What a student of one scheme becomes."""

    formats: list[FormatName] = field(default_factory=lambda: ["packed"])
    """Folders to write."""


@dataclass
class ExportTable:
    """The file `7_export.toml`."""

    max_tokens: int = 8192
    """Room in a program's cache, prompt and continuation together; a device's memory decides."""

    cpu: SchemeTable = field(default_factory=SchemeTable)
    accelerator: SchemeTable = field(default_factory=SchemeTable)


def load_export_table(path: str | Path) -> ExportTable:
    """Reads the file.

    Raises:
        ConfigError: with all its problems.
    """
    values, problems = check_table(ExportTable, read_toml(Path(path), "formats of an export"), str(path))
    for name in ("cpu", "accelerator"):
        values[name] = SchemeTable(**values.get(name, {}))
    table = ExportTable(**values)
    if table.max_tokens < 1:
        problems.append(Problem(str(path), "max_tokens", str(table.max_tokens), "a positive number"))
    if "executorch" in table.accelerator.formats:
        expected = '"packed" and "torchao": XNNPACK has no kernels for ranges of whole rows and bfloat16 activations'
        problems.append(Problem(str(path), "accelerator.formats", '"executorch"', expected))
    if problems:
        raise ConfigError(str(path), problems)
    return table


def missing_packages(table: ExportTable, scheme: str) -> Iterator[str]:
    """What is not installed of what the formats of a scheme need, with the cure."""
    for name in getattr(table, scheme).formats:
        for package in _PACKAGES[name]:
            if find_spec(package) is None:
                yield f"{scheme}.formats: {name} needs {package}: pip install 'mobilellm-pro[export,hf]'"


def export(
    formats: str,
    checkpoint: str,
    output: str,
    *,
    scheme: Literal["cpu", "accelerator"] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a student for phones: packed int4, transformers with torchao, ExecuTorch. Each is run and compared first.

    What a student was trained with is what is written, integers and ranges, to the bit. A checkpoint in full precision
    can be exported too, rounded to nearest (PTQ): it loses more.

    Args:
        formats: TOML file that says which formats.
        checkpoint: a run folder, one `step-N` folder, or a Hugging Face folder.
        output: folder to write to.
        scheme: cpu or accelerator; default: the one that the checkpoint was trained with.
        overwrite: replace an export that is there already.

    Raises:
        ConfigError: everything that is wrong with the file.
        ValueError: packages are missing; the checkpoint is no student's, was trained with another scheme, was not
            trained quantized and no scheme is given, or has NaN or infinite weights; or a written file does not
            compute what the checkpoint computes.
    """
    begin, folder, table = time.monotonic(), Path(output), load_export_table(formats)
    if (folder / DONE).is_file() and not overwrite:
        raise ValueError(f"{folder} holds an export already; choose another folder or say --overwrite")
    model, tokens, expected, dtype = _quantized(checkpoint, scheme, table)
    _compare("the quantized weights", unpacked_student(model, dtype=dtype)(tokens), expected)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DONE, RECORD, TABLE):
        (folder / name).unlink(missing_ok=True)
    made = {}
    for name in getattr(table, model.scheme_name).formats:
        print(f"{name}: writing {folder / name}", flush=True)
        shutil.rmtree(folder / name, ignore_errors=True)
        made[name] = _WRITERS[name](model, folder / name, table, tokens, expected)
    record = {
        "checkpoint": checkpoint,
        "scheme": model.scheme_name,
        "trained": model.trained,
        "formats": made,
        "seconds": round(time.monotonic() - begin, 1),
        "peak_bytes": cpu_device.memory_stats()["active_bytes.all.peak"],
    }
    write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")
    write_atomically(folder / TABLE, "\n".join(_table(record)) + "\n")
    write_atomically(folder / DONE, json.dumps({"export": RECORD}) + "\n")
    print((folder / TABLE).read_text(), end="")


@torch.no_grad()
def _quantized(checkpoint: str, scheme: str | None, table: ExportTable) -> tuple[QuantizedModel, Tensor, Tensor, str]:
    """The model, ids [2, S], the checkpoint's own logits for them [2, S, V], and the type that it was trained in."""
    student, tokenizer, max_tokens = load_model(checkpoint)
    if not isinstance(student, Student):
        raise ValueError(f"{checkpoint}: a {type(student).__name__.lower()}; only students are exported")
    if student.quantization is None:
        if scheme is None:
            raise ValueError(
                f"{checkpoint} was not trained quantized: train it with [quantization], or say --scheme cpu or "
                "--scheme accelerator to round it to nearest, which loses more"
            )
        print(f"WARNING: {checkpoint} never saw quantization: it is rounded to nearest (PTQ)", file=sys.stderr)
    chosen = scheme or student.quantization.name  # type: ignore[union-attr]  # one of the two is there
    if missing := list(missing_packages(table, chosen)):
        raise ValueError("\n".join(missing))
    model = quantize_student(student, chosen, tokenizer, max_tokens)
    if student.quantization is None:
        quantize_modules(student, StudentQuantization(chosen))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.args.vocab_size, (2, min(_PROMPT_TOKENS, max_tokens)), generator=draw)
    assert student.quantization is not None
    dtype = student.quantization.param_dtype
    return model, tokens, student.to(dtype)(tokens).float(), str(dtype).removeprefix("torch.")


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found.float(), expected):
        off = float((found.float() - expected).abs().max() / expected.std())
        raise ValueError(
            f"{what} do not compute what the checkpoint computes: logits differ by up to {off:.2g} of their standard "
            "deviation; nothing was written"
        )


def _write_packed(model: QuantizedModel, folder: Path, table: ExportTable, tokens: Tensor, expected: Tensor) -> Any:
    write_packed(model, folder)
    read = read_packed(folder)
    for name, weight in model.weights.items():
        if not all(torch.equal(ours, theirs) for ours, theirs in zip(weight, read.weights[name], strict=True)):
            raise ValueError(f"{folder}: {name} is not what was written")
    arithmetic = packed_bytes(model.args, model.scheme).total
    return {"bytes": _bytes(folder, "*.safetensors"), "computed_bytes": arithmetic, "checked": "integers and scales"}


def _write_torchao(model: QuantizedModel, folder: Path, table: ExportTable, tokens: Tensor, expected: Tensor) -> Any:
    from mobilellm_pro.convert.torchao_folder import check_torchao, write_torchao

    write_torchao(model, folder)
    differences = check_torchao(folder, model, tokens)
    off = differences.training / differences.logits
    return {
        "bytes": _bytes(folder, "*.safetensors"),
        "computed_bytes": torchao_bytes(model.args, model.scheme).total,
        "checked": f"integers, scales; logits in transformers {off:.2g} standard deviations off (RMS)",
        "differences": differences._asdict(),
    }


def _write_executorch(model: QuantizedModel, folder: Path, table: ExportTable, tokens: Tensor, expected: Tensor) -> Any:
    from mobilellm_pro.convert.executorch_export import export_executorch

    report = export_executorch(model, folder, max_tokens=table.max_tokens)
    # ExecuTorch's library must read tokenizer.json: with tokenizer.model alone it would split text in another way.
    write_tokenizer(Tokenizer.load(model.tokenizer), folder, max_tokens=table.max_tokens)
    compared = report.comparison
    return {
        "bytes": report.program_bytes + report.data_bytes,
        "computed_bytes": packed_bytes(model.args, model.scheme).total,
        "checked": f"ran: {compared.num_tokens - compared.num_ties} of {compared.num_tokens} greedy tokens equal "
        f"({compared.num_ties} ties), logits at most {compared.largest_difference:.2g} standard deviations off",
        "report": asdict(report),
    }


_WRITERS: dict[str, Callable[[QuantizedModel, Path, ExportTable, Tensor, Tensor], dict[str, Any]]] = {
    "packed": _write_packed,
    "torchao": _write_torchao,
    "executorch": _write_executorch,
}


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def _table(record: dict[str, Any]) -> Iterator[str]:
    """Markdown: what each format takes, and how it was compared."""
    how = "trained quantized" if record["trained"] else "rounded to nearest, never trained quantized (PTQ)"
    yield f"{record['checkpoint']}, scheme {record['scheme']}, {how}"
    yield ""
    yield "| format | MB | by arithmetic | checked |"
    yield "|---|---:|---:|---|"
    for name, made in record["formats"].items():
        yield f"| {name} | {made['bytes'] / 1e6:.2f} | {made['computed_bytes'] / 1e6:.2f} | {made['checked']} |"
