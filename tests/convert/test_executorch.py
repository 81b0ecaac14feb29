"""The exported program is the quantized model: its integers, and in ExecuTorch's own runtime its logits and tokens."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm_pro.convert import executorch_export, executorch_runtime
from mobilellm_pro.convert.executorch_decoder import Decoder, Ring
from mobilellm_pro.convert.executorch_export import Comparison, ExecutorchReport, export_executorch
from mobilellm_pro.convert.executorch_runtime import DeviceProgram, ExecutorchMissing
from mobilellm_pro.convert.quantized_model import QuantizedModel, quantize_student
from mobilellm_pro.convert.unpacked_student import unpacked_student
from mobilellm_pro.evaluation.program_model import ProgramModel
from mobilellm_pro.evaluation.text_model import Ending, Sampling, StudentModel
from mobilellm_pro.model.kv_cache import KVCache
from mobilellm_pro.model.student import Student, StudentArgs
from mobilellm_pro.quantization.scheme import SCHEMES, WeightScheme
from mobilellm_pro.quantization.token_quantizer import fake_quantize_tokens
from tests.convert.quantized_students import xnnpack_parts

ARGS = StudentArgs(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=16,
    global_layers=(0,),
)
MAX_TOKENS = 80
EMPTY = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight")
"""Weights that begin with a group of zeros, which has no scale."""
SHORT_NORM = "norm.weight"
"""A norm that fits into bfloat16; the others do not."""


class Exported(NamedTuple):
    model: QuantizedModel
    folder: Path
    report: ExecutorchReport


def student() -> Student:
    torch.manual_seed(0)
    made = Student(ARGS)
    made.init_weights()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:  # norms begin at 1, which would hide one that is left out
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)  # so that logits depend on more than the last token
            if name in EMPTY:
                parameter[0, :32] = 0
            if name == SHORT_NORM:
                parameter.copy_(parameter.bfloat16())
    return made.eval()


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    return quantize_student(student(), "cpu", "tokenizer.model", MAX_TOKENS)


@pytest.fixture(scope="module")
def exported(model: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("executorch") / "program"
    return Exported(model, folder, export_executorch(model, folder, max_tokens=MAX_TOKENS))


@pytest.fixture
def program(exported: Exported) -> DeviceProgram:
    return DeviceProgram(exported.folder)


def ids(count: int, seed: int = 1) -> list[int]:
    return torch.randint(ARGS.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def run_student(model: QuantizedModel, tokens: list[int]) -> Tensor:
    """Logits after the last token of the student itself, over the same integers, with rounded activations and cache."""
    reference = Student(ARGS).eval()
    state = {name: weight.dequantize() for name, weight in model.weights.items()} | dict(model.norms)
    reference.load_state_dict(state)

    def rounded(x: Tensor) -> Tensor:
        return fake_quantize_tokens(x, 8, "integer")

    for module in reference.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    head: Callable[[Tensor, Tensor], Tensor] = lambda hidden, weight: F.linear(rounded(hidden[:, -1]), weight)  # noqa: E731
    return reference(torch.tensor([tokens]), cache=KVCache(MAX_TOKENS, "int8"), head=head)[0]


def test_program_computes_what_the_eager_model_computes(exported: Exported):
    report = exported.report
    assert report.comparison.num_tokens == 80 and report.comparison.num_ties == 0
    # Where a sum in another order moves an activation over the edge of an int8 step, 64 features feel it.
    assert report.comparison.median_difference < 1e-4 and report.comparison.largest_difference < 0.1
    assert {file.name: file.stat().st_size for file in exported.folder.iterdir()} == {
        "model.pte": report.program_bytes,
        "model.ptd": report.data_bytes,
    }
    assert report.lowering_seconds > 0 and report.comparison_seconds > 0 and report.peak_bytes > 2**27


@pytest.mark.parametrize("length", [1, 15, 16, 17, 60])
def test_program_computes_what_the_student_computes(exported: Exported, program: DeviceProgram, length: int):
    """Written for training and for devices by different code; also from one token to a ring that has turned often."""
    theirs, ours = program.extend(ids(length)), run_student(exported.model, ids(length))
    assert (theirs - ours).abs().max() < 2e-3 * ours.std()
    assert theirs.argmax() == ours.argmax()


def test_chunks_do_not_matter(program: DeviceProgram):
    whole = program.extend(ids(50))
    for sizes in ([16, 16, 16, 2], [7, 1, 30, 12], [1] * 50):
        program.reset()
        remaining = ids(50)
        for size in sizes:
            chunk, remaining = remaining[:size], remaining[size:]
            logits = program.extend(chunk)
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)


def test_nothing_of_an_earlier_sequence_is_seen(exported: Exported, program: DeviceProgram):
    program.extend(ids(MAX_TOKENS, seed=2))
    program.reset()
    torch.testing.assert_close(program.extend(ids(9)), DeviceProgram(exported.folder).extend(ids(9)), atol=0, rtol=0)


def test_memory_that_begins_with_any_bits_is_not_seen(model: QuantizedModel):
    clean, dirty = (executorch_export.decoder_of(model, MAX_TOKENS) for _ in range(2))
    for name, buffer in dirty.named_buffers():
        if ".attention." in name:
            buffer.fill_(torch.nan if buffer.is_floating_point() else 255)
    for start in (0, 5):
        inputs = torch.tensor([ids(5, seed=start)]), torch.tensor([start])
        assert torch.equal(clean(*inputs), dirty(*inputs))


def test_continues_greedily(program: DeviceProgram):
    new = program.continue_tokens(ids(20), 12)
    tokens = ids(20)
    for token in new:
        program.reset()
        assert int(program.extend(tokens).argmax()) == token
        tokens.append(token)
    stopped = program.continue_tokens(ids(20), 12, stop_ids=[new[3]])
    assert stopped == new[: new.index(new[3]) + 1]


def test_files_hold_the_integers_and_scales_to_the_bit_and_the_table_once(exported: Exported):
    data = (exported.folder / "model.ptd").read_bytes()
    for name, weight in exported.model.weights.items():
        if name in EMPTY:
            assert weight.scales[0, 0] == 0
        assert [data.count(part) for part in xnnpack_parts(name, weight)] == [1, 1], name
    for name, norm in exported.model.norms.items():
        stored = norm.bfloat16().view(torch.int16) if name == SHORT_NORM else norm
        assert data.count(stored.numpy().tobytes()) == 1, name
    num_weights = sum(weight.integers.numel() for weight in exported.model.weights.values())
    # Half a byte a weight and two of a scale; the rest is norms, names and alignment.
    assert num_weights * (1 / 2 + 2 / 32) < len(data) < num_weights * (1 / 2 + 2 / 32) + 20_000
    assert exported.report.program_bytes < 100_000


def test_cache_bytes(exported: Exported):
    of_a_token = 2 * ARGS.num_key_value_heads * (ARGS.head_dim + 8)
    assert exported.report.cache_bytes == of_a_token * (MAX_TOKENS + ARGS.sliding_window)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 5), (3, 8), (8, 8), (21, 1), (37, 6)])
def test_ring_is_a_window(start: int, count: int):
    """Against a definition by positions: which tokens lie in the ring, and which of all a new one may see."""
    window = 8
    ring = Ring.of(start, count, window)
    held = {position % window: position for position in range(max(0, start - window), start)}
    assert [bool(x) for x in ring.filled.flatten()] == [slot in held for slot in range(window)]
    assert ring.indices.tolist() == 2 * [[position % window for position in range(start, start + count)]]
    for row, query in enumerate(range(start, start + count)):
        keys = [held.get(slot, -1) for slot in range(window)] + list(range(start, start + count))
        seen = [0 <= key <= query and query - key < window for key in keys]
        assert [value == 0 for value in ring.mask[row].tolist()] == seen


def changed(model: QuantizedModel, name: str, **parts: Tensor) -> QuantizedModel:
    return replace(model, weights={**model.weights, name: model.weights[name]._replace(**parts)})


def test_a_program_that_computes_something_else_is_refused(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The files of one model for another, which differs in one scale of one layer."""
    name = "layers.1.mlp.down_proj.weight"
    weight = exported.model.weights[name]
    other = changed(exported.model, name, scales=weight.scales * 3)

    def other_files(decoder: Decoder, folder: Path) -> None:
        shutil.copytree(exported.folder, folder, dirs_exist_ok=True)

    monkeypatch.setattr(executorch_export, "write_program", other_files)
    with pytest.raises(ValueError, match="the exported program continues a prompt|differ from the eager model's"):
        export_executorch(other, tmp_path / "other", max_tokens=MAX_TOKENS)
    assert not list(tmp_path.iterdir())
    assert export_executorch(exported.model, tmp_path / "same", max_tokens=MAX_TOKENS).comparison.num_ties == 0


@pytest.mark.parametrize(("largest", "median"), [(0.3, 0.01), (0.1, 0.06), (torch.inf, 0.0), (torch.nan, torch.nan)])
def test_logits_beyond_the_tolerances_are_refused(largest: float, median: float):
    executorch_export.check(Comparison(80, 0, 0.2, 0.04))
    with pytest.raises(ValueError, match=r"up to 0.25 and 0.05 are rounding"):
        executorch_export.check(Comparison(80, 0, largest, median))


def test_what_a_program_does_not_take(program: DeviceProgram, exported: Exported, tmp_path: Path):
    with pytest.raises(ValueError, match="no tokens"):
        program.extend([])
    with pytest.raises(ValueError, match="token id 512; this program knows 0 to 511"):
        program.extend([3, 512])
    with pytest.raises(ValueError, match="81 tokens; this program was exported for 80"):
        program.extend(ids(81))
    program.extend(ids(80))
    with pytest.raises(ValueError, match="81 tokens"):
        program.extend([1])
    with pytest.raises(ValueError, match="exists already"):
        export_executorch(exported.model, exported.folder, max_tokens=MAX_TOKENS)
    shutil.copy(exported.folder / "model.pte", tmp_path)
    with pytest.raises(FileNotFoundError, match="model.ptd is missing"):
        DeviceProgram(tmp_path)


def test_what_cannot_be_exported(model: QuantizedModel, tmp_path: Path):
    name = "layers.1.self_attn.k_proj.weight"
    integers, scales = model.weights[name]
    without = {other: weight for other, weight in model.weights.items() if other != name}
    spoiled = scales.clone()
    spoiled[3, 1] = torch.nan
    cases = [
        (replace(model, weights=without), f"{name} is missing"),
        (replace(model, norms={}), "norm.weight is missing"),
        (changed(model, name, scales=spoiled), rf"the scales of {name}: 1 of 64 .* the first at \[3, 1\]"),
        (changed(model, name, scales=scales * 1e-38), f"{name}: a scale of .* too small"),
        (changed(model, name, scales=-scales), f"{name}: a scale of .* negative"),
        (changed(model, name, scales=scales.float()), f"{name}: scales in torch.float32"),
        (changed(model, name, integers=integers * 2), f"{name}: torch.int8 from .*; expected int8, -8 to 7"),
        (changed(model, name, integers=integers[:5]), rf"{name}: integers \[5, 64\] .* has \[32, 64\]"),
    ]
    for spoilt, message in cases:
        with pytest.raises(ValueError, match=message):
            export_executorch(spoilt, tmp_path / "out", max_tokens=MAX_TOKENS)
    with pytest.raises(ValueError, match="max_tokens = 8; expected at least 32"):
        export_executorch(model, tmp_path / "out", max_tokens=8)
    assert not list(tmp_path.iterdir())


def test_schemes_without_kernels(model: QuantizedModel, tmp_path: Path):
    accelerator = quantize_student(student(), "accelerator", "tokenizer.model", MAX_TOKENS)
    with pytest.raises(ValueError, match='scheme "accelerator" cannot be exported .* one table'):
        export_executorch(accelerator, tmp_path / "out", max_tokens=MAX_TOKENS)
    for part, message in (
        ({"weights": WeightScheme(bits=3)}, "weights of 4 bits"),
        ({"weights": WeightScheme(group=16)}, "groups of a multiple of 32"),
        ({"cache": "model"}, "a cache in int8"),
        ({"activation_bits": None}, "activations of 8 bits"),
    ):
        own = replace(model, scheme_name="own", scheme=replace(SCHEMES["cpu"], **part))
        with pytest.raises(ValueError, match=f'scheme "own" cannot be exported .* want [a-z ]*{message}, as'):
            export_executorch(own, tmp_path / "out", max_tokens=MAX_TOKENS)


def test_executorch_that_is_not_installed(model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executorch_runtime, "find_spec", lambda name: None)
    with pytest.raises(ExecutorchMissing, match=r"pip install 'mobilellm-pro\[export\]'"):
        export_executorch(model, tmp_path / "out", max_tokens=MAX_TOKENS)


def test_a_program_scores_as_its_eager_model(exported: Exported):
    """Log likelihoods of an evaluation; a step of an activation's int8 more or less is all that differs."""
    endings = [Ending(ids(length, length), scored) for length, scored in ((5, 1), (20, 4), (40, 6), (40, 1))]
    endings += [Ending([*ids(30, 7), last], 1) for last in (1, 2, 3)]
    eager = unpacked_student(exported.model, zero_point="integer")
    expected = dict(StudentModel(eager, MAX_TOKENS).scores(endings))
    program = ProgramModel(exported.folder)
    assert (program.vocab_size, program.max_tokens) == (ARGS.vocab_size, MAX_TOKENS)
    found = dict(program.scores(endings))
    for number, (_, scored) in enumerate(endings):
        assert found[number].log_likelihood == pytest.approx(expected[number].log_likelihood, abs=0.1 * scored)
        assert found[number].log_likelihood < -scored
    sampling = Sampling(max_new_tokens=6)
    ((_, new),) = program.continuations([ids(20, 3)], sampling, lambda ids: len(ids) == 3)
    assert new == DeviceProgram(exported.folder).continue_tokens(ids(20, 3), 3)
    with pytest.raises(ValueError, match="greedily"):
        next(program.continuations([[1]], Sampling(6, temperature=1.0), lambda ids: False))
