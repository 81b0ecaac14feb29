"""The `export` verb: what was trained is what is written, said and compared; what cannot be exported is named."""

import json
from pathlib import Path

import pytest
import torch

from mobilellm_pro.config import ConfigError
from mobilellm_pro.convert import export as exports
from mobilellm_pro.convert.executorch_runtime import DeviceProgram
from mobilellm_pro.convert.export import export, load_export_table
from mobilellm_pro.convert.packed_folder import load_packed_student, read_packed
from mobilellm_pro.convert.unpacked_student import unpacked_student
from mobilellm_pro.model.checkpoint import load_model
from mobilellm_pro.model.kv_cache import KVCache
from tests.training.small_world import SmallWorld

FORMATS = '[cpu]\nformats = ["packed", "torchao"]\n[accelerator]\nformats = ["packed"]\n'
SAVE = ("--checkpoint.enable", "--checkpoint.no_last_save_model_only", "--training.steps=1", "--distill.objective=ce")


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("export") / "7_export.toml"
    path.write_text(FORMATS)
    return str(path)


@pytest.fixture(scope="module")
def trained(world: SmallWorld) -> dict[str, Path]:
    own = {name: (f"--quantization.scheme={name}", '--model.converters=["qat"]') for name in ("cpu", "accelerator")}
    runs = {name: world.run(f"export_{name}", 1, *SAVE, *words) for name, words in own.items()}
    return runs | {"full precision": world.run("export_full", 1, *SAVE)}


@pytest.mark.parametrize("scheme", ["cpu", "accelerator"])
def test_what_was_trained_is_what_ships(trained: dict[str, Path], formats: str, tmp_path: Path, scheme: str) -> None:
    export(formats, str(trained[scheme]), str(tmp_path / "out"))
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert record["scheme"] == scheme and record["trained"] and (tmp_path / "out/DONE").is_file()
    assert f"scheme {scheme}, trained quantized" in (tmp_path / "out/sizes.md").read_text()
    made = record["formats"]["packed"]
    assert made["computed_bytes"] < made["bytes"] < made["computed_bytes"] + 20_000  # the header
    ours, theirs = load_packed_student(tmp_path / "out/packed", dtype="float32"), load_model(trained[scheme])
    tokens = torch.arange(60).view(2, 30)
    assert torch.equal(ours.model(tokens), theirs.model(tokens))


def test_a_program_holds_what_was_trained_and_says_what_the_student_says(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "7_export.toml").write_text('max_tokens = 64\n[cpu]\nformats = ["packed", "executorch"]\n')
    export(str(tmp_path / "7_export.toml"), str(trained["cpu"]), str(tmp_path / "out"))
    folder = tmp_path / "out/executorch"
    made = json.loads((tmp_path / "out/export.json").read_text())["formats"]["executorch"]
    assert made["bytes"] == sum((folder / name).stat().st_size for name in ("model.pte", "model.ptd"))
    assert (folder / "tokenizer.json").is_file() and "greedy tokens equal" in made["checked"]
    stored = (folder / "model.ptd").read_bytes()
    packed = read_packed(tmp_path / "out/packed")
    for name, weight in packed.weights.items():
        assert weight.scales.view(torch.int16).numpy().tobytes() in stored, name
    student = unpacked_student(packed, zero_point="integer")
    tokens = list(range(300, 340))
    theirs = DeviceProgram(folder).extend(tokens)
    ours = student(torch.tensor([tokens]), cache=KVCache(64, student.cache_dtype))[0, -1]
    assert (theirs - ours).abs().max() < 0.1 * ours.std()  # an input on the edge of an int8 step may fall either way


def test_a_checkpoint_in_full_precision_is_rounded_loudly(
    trained: dict[str, Path], formats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained["full precision"])
    with pytest.raises(ValueError, match="was not trained quantized: .* say --scheme cpu"):
        export(formats, checkpoint, str(tmp_path / "out"))
    export(formats, checkpoint, str(tmp_path / "out"), scheme="accelerator")
    assert "WARNING" in (printed := capsys.readouterr()).err and "(PTQ)" in printed.err
    assert "never trained quantized (PTQ)" in printed.out
    with pytest.raises(ValueError, match="holds an export already"):
        export(formats, checkpoint, str(tmp_path / "out"), scheme="cpu")
    export(formats, checkpoint, str(tmp_path / "out"), scheme="accelerator", overwrite=True)


def test_a_file_that_is_not_what_was_trained_is_no_success(
    trained: dict[str, Path], formats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = exports.quantize_student

    def wrong(*args: object) -> object:
        model = plain(*args)  # type: ignore[arg-type]
        model.weights["layers.0.mlp.up_proj.weight"].scales[3] *= 1.5
        return model

    monkeypatch.setattr(exports, "quantize_student", wrong)
    with pytest.raises(ValueError, match="do not compute what the checkpoint computes: logits differ by up to"):
        export(formats, str(trained["cpu"]), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_named(
    trained: dict[str, Path], formats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match='trained with the quantization scheme "cpu" and cannot be exported'):
        export(formats, str(trained["cpu"]), out, scheme="accelerator")
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"cpu.formats: torchao needs torchao: pip install 'mobilellm-pro\[export,hf\]'"
    ):
        export(formats, str(trained["cpu"]), out)
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[cpu]\nformats = ["packt"]', "packed"),
        ("max_tokens = 0", "a positive number"),
        ('[accelerator]\nformats = ["executorch"]', "XNNPACK has no kernels"),
        ("[gpu]", "gpu"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_export_table(tmp_path / "x.toml")
