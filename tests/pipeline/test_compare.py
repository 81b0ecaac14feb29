"""The table and the plots say what the runs' metrics say."""

import json
import struct
from pathlib import Path

import pytest

from mobilellm_pro.pipeline.compare import compare
from mobilellm_pro.training.run_folder import append_metrics, read_metrics


def fake_run(folder: Path, bits: list[float], **more: float) -> Path:
    folder.mkdir()
    for step, value in enumerate(bits, start=1):
        append_metrics(
            folder, {"kind": "train", "step": step, "distill/ce": value * 2, "tokens_per_second": 100 * step}
        )
        append_metrics(folder, {"kind": "validation", "step": step, "bits_per_byte": value, "ce": value * 2, **more})
    return folder


def test_table_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = fake_run(tmp_path / "distilled", [3.0, 2.0, 1.5], teacher_bits_per_byte=1.25)
    second = fake_run(tmp_path / "labels", [3.0, 2.5, 2.25])
    rows = compare([str(first), str(second)], out=str(tmp_path / "out"))
    assert [(row.name, row.bits_per_byte) for row in rows] == [
        ("teacher of distilled", 1.25),
        ("distilled", 1.5),
        ("labels", 2.25),
    ]
    table = capsys.readouterr().out
    assert (
        "| distilled | 3 | 1.5000 | 3.0000 | 200 |" in table
        and table.strip() in (tmp_path / "out/comparison.md").read_text()
    )
    assert json.loads((tmp_path / "out/comparison.json").read_text())[1]["bits_per_byte"] == 1.5
    for name in ("training_loss.png", "held_out.png"):
        header = (tmp_path / "out" / name).read_bytes()[:24]
        assert header.startswith(b"\x89PNG") and min(struct.unpack(">II", header[16:])) > 300


def test_a_step_that_was_run_twice_counts_once_and_a_torn_line_not_at_all(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", [3.0, 2.0])
    append_metrics(folder, {"kind": "train", "step": 2, "distill/ce": 9.0})
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')
    append_metrics(folder, {"kind": "train", "step": 3, "distill/ce": 8.0})
    assert [record["distill/ce"] for record in read_metrics(folder, "train")] == [6.0, 9.0, 8.0]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        compare([str(tmp_path)], out=str(tmp_path / "out"))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="validation.enable = true"):
        compare([str(tmp_path)], out=str(tmp_path / "out"))
