"""The page of a run says what its phases have left, whole or not, and a browser shows it."""

import json
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from mobilellm_pro.convert.conversion import write_safetensors
from mobilellm_pro.data_mix.report_page import write_report as write_mix_report
from mobilellm_pro.data_mix.report_record import make_report
from mobilellm_pro.data_mix.weights import MixProblem, baseline_weights, static_weights
from mobilellm_pro.evaluation.needle_grid import CellResult, Grid
from mobilellm_pro.evaluation.needle_results import summary, write_result
from mobilellm_pro.merging.search_plot import draw_search
from mobilellm_pro.merging.weight_search import SearchSettings, search_weights
from mobilellm_pro.pipeline.ledger import Ledger, Record
from mobilellm_pro.pipeline.phases import load_pipeline
from mobilellm_pro.pipeline.run_report import report
from mobilellm_pro.pipeline.run_report_page import run_page
from mobilellm_pro.pipeline.run_report_record import CURVE_POINTS, make_run_report
from mobilellm_pro.training.run_folder import append_metrics
from tests.data_mix.test_report import Page

PHASES = {
    "0_prepare": 'kind = "prepare"',
    "0_mix": 'kind = "data_mix"',
    "1_language": 'kind = "train"\nneeds = ["0_prepare"]',
    "1_folder": 'kind = "convert"\ninitial_checkpoint = "phase:1_language"',
    "2_context": 'kind = "train"\ninitial_checkpoint = "phase:1_language"',
    "3_code": 'kind = "train"\ninitial_checkpoint = "phase:2_context"',
    "3_mathematics": 'kind = "train"\ninitial_checkpoint = "phase:2_context"',
    "3_merge": """kind = "merge"
initial_checkpoint = "phase:2_context"
branches.code = "phase:3_code"
branches.mathematics = "phase:3_mathematics\"""",
    "6_evaluate": 'kind = "evaluate"\ninitial_checkpoint = "phase:3_merge"',
    "7_export": 'kind = "export"\ninitial_checkpoint = "phase:3_merge"',
}
SECTIONS = ["run", "phases", "curves", "tokens", "mix", "merge", "needle", "evaluation", "sizes"]
ENVIRONMENT = {"commit": "0123abc", "processor": "A <fast> one", "cpus": 2, "world_size": 1}
BRANCHES, GROUPS = ("code", "mathematics"), ("embedding", "layers 0 to end")


def write_pipeline(folder: Path) -> Path:
    (folder / "any.toml").write_text("")
    text = f'output = "{folder / "out"}"\n'
    for name, keys in PHASES.items():
        config = "" if name == "1_folder" else 'config = "any.toml"\n'
        text += f'[[phase]]\nname = "{name}"\n{config}{keys}\n'
    path = folder / "pipeline.toml"
    path.write_text(text)
    return path


def write_run(folder: Path, steps: int, *, seed: int, of_steps: int | None = None) -> None:
    """What a training leaves."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f"[training]\nsteps = {of_steps or steps}\n")
    (folder / "environment.json").write_text(json.dumps({**ENVIRONMENT, "world_size": 2, "versions": {"torch": "2.1"}}))
    for step in range(1, steps + 1):
        kl = 2 / step**0.5 + 0.05 * rng.random()
        terms = {"distill/kl": kl, "distill/ce": kl + 5, "distill/teacher_ce": 5.0}
        read = {"tokens/code": 300 * step, "tokens/mathematics": 100 * step, "epochs/code": step / 8}
        speeds = {"tokens_per_second": 1000.0 + step, "n_tokens_seen": 400.0 * step}
        append_metrics(folder, {"kind": "train", "step": step, "loss": kl, **terms, **read, **speeds})
        if step % 4 == 0:
            bits = {"bits_per_byte": 2 + kl / 4, "ce": 5.5, "kl": kl, "teacher_bits_per_byte": 1.75}
            append_metrics(folder, {"kind": "validation", "step": step, **bits})
    write_checkpoint(folder / "checkpoint" / f"step-{steps}")


def write_checkpoint(step: Path) -> None:
    weights = {"embed_tokens.weight": torch.zeros(50, 8), "norm.weight": torch.zeros(8)}
    state = {**weights, "optimizer.state.norm.weight.exp_avg": torch.zeros(8)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(step), no_dist=True)


def write_needle(path: Path, lengths: tuple[int, ...]) -> None:
    grid = Grid(lengths, 3, 2)
    results = [CellResult(cell, 9, "1234567", "", cell.length < 600 or cell.depth > 60) for cell in grid.cells()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path.parent, summary(grid, results), path.name)


def write_mix(folder: Path) -> None:
    names, tokens = ("code", "mathematics"), (900, 100)
    rng = np.random.default_rng(0)
    result = static_weights(
        MixProblem(names, tokens, train_tokens=500, temperature=0.3), np.array([0.1, 0.3]), rng.normal(size=(9, 2)) / 5
    )
    influence = {"influence": rng.normal(size=(2, 2)) * 1e-4, "domains": ["prose", "code"]}
    write_mix_report(make_report("A mix", result, baseline_weights(names, tokens), **influence), folder)


def write_merge(folder: Path) -> None:
    """A search over a score with its best at 0.3 and 0.7, as `merge` records it."""
    settings = SearchSettings("coordinate", 40, draws=8, seed=1)
    candidates = search_weights(lambda w, _: 2 + float(((w - [0.3, 0.7]) ** 2).sum()), 2, settings, groups=2)
    best = min(candidates, key=lambda candidate: candidate.score)
    shown = {"pre-anneal": None, "specialist code": candidates[1], "specialist mathematics": candidates[2]}
    shown |= {"uniform average": candidates[0], "searched average": best}
    rows = []
    for name, candidate in shown.items():
        score = 2.9 if candidate is None else candidate.score
        weights = None if candidate is None else candidate.weights.tolist()
        bits = {"prose": score + 0.25, "code": score - 0.25}
        rows.append({"name": name, "bits_per_byte": bits, "mean": score, "dev_score": score, "weights": weights})
    weights = {group: dict(zip(BRANCHES, row)) for group, row in zip(GROUPS, best.weights.tolist())}
    record = {"branches": BRANCHES, "domains": ["prose", "code"], "method": "coordinate", "score": "bits per byte"}
    record |= {"candidates": 40, "groups": GROUPS, "weights": weights, "rows": rows}
    record |= {"distances": {"code": 0.01, "mathematics": 0.5}, "barriers": {"code": 0.001, "mathematics": None}}
    record |= {"warnings": ["branch mathematics is far away"]}
    (folder / "merge.json").write_text(json.dumps(record))
    picture = draw_search(candidates, best.weights, BRANCHES, GROUPS, score="bits per byte")
    (folder / "search.png").write_bytes(picture)


def write_evaluation(folder: Path) -> None:
    scores = {
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.01},
        "nq_open": {"exact_match,remove_whitespace": 0.125, "exact_match_stderr,remove_whitespace": "N/A"},
        "wikitext": {"word_perplexity,none": 31.5},
        "a_group": {"alias": "a_group"},
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"results": scores, "versions": {}}))


def write_full_run(folder: Path) -> Path:
    """All sections have something: phases that are done, one that failed, one that was killed, one that is to run."""
    path, out = write_pipeline(folder), folder / "out"
    write_run(out / "1_language", 12, seed=1)
    write_run(out / "2_context", 5, seed=2, of_steps=20)
    write_run(out / "3_code", 4, seed=3)
    write_mix(out / "0_mix")
    write_checkpoint(out / "3_merge" / "checkpoint" / "step-0")
    write_merge(out / "3_merge")
    write_needle(out / "2_context" / "needle" / "step-2.json", (300, 600))
    write_needle(out / "2_context" / "needle" / "step-4.json", (500, 700))
    write_evaluation(out / "6_evaluate")
    write_needle(out / "6_evaluate" / "needle.json", (500, 700))
    (out / "1_folder").mkdir()
    (out / "1_folder" / "config.json").write_text("{}")
    write_safetensors({"model.norm.weight": torch.zeros(8, dtype=torch.bfloat16)}, out / "1_folder")
    (out / "7_export").mkdir()
    (out / "7_export" / "model.pte").write_bytes(bytes(2_500_000))
    (out / "7_export" / "log.txt").write_text("small")
    ledger = Ledger(out)
    for number, phase in enumerate(load_pipeline(path).phases):
        if phase.name == "3_mathematics":
            continue
        record = Record(phase.name, phase.kind, state="done", starts=1, wall_seconds=100.0 * number + 30)
        record.begun, record.ended = f"2026-11-2{number}T08:00:00+00:00", f"2026-11-2{number}T09:00:00+00:00"
        record.product, record.environment = str(phase.folder), {**ENVIRONMENT, "cpus": 4 if number < 2 else 2}
        if phase.name == "2_context":
            record.state, record.product, record.ended = "running", None, ""
        if phase.name == "3_code":
            record.state, record.product, record.error = "failed", None, "phase: ended with <status> 1\n  at line 3"
        ledger.write(record)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, Page]:
    """Folder of the output, report.json and the parsed page."""
    folder = tmp_path_factory.mktemp("run")
    report(str(write_full_run(folder)))
    out = folder / "out"
    return out, json.loads((out / "report.json").read_text()), Page((out / "report.html").read_text())


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, Page]:
    folder = tmp_path_factory.mktemp("empty")
    report(str(write_pipeline(folder)), output=str(folder / "elsewhere"))
    out = folder / "elsewhere"
    return out, json.loads((out / "report.json").read_text()), Page((out / "report.html").read_text())


def test_sections_and_no_other_file(full):
    out, _, page = full
    assert list(page.tables) == SECTIONS and not page.open, "every section once, every tag closed"
    assert page.links == [f"#{key}" for key in SECTIONS] + ["0_mix/mix_report.html"]
    assert all((out / link).is_file() for link in page.links if not link.startswith("#"))
    text = (out / "report.html").read_text()
    assert "<script" not in text and "http" not in text and "url(" not in text
    assert page.images and all(source.startswith("data:image/") for source in page.images)


def test_phases_are_as_the_ledger_has_them(full):
    _, content, page = full
    header, *rows = page.tables["phases"]
    cells = {row[0]: dict(zip(header, row)) for row in rows}
    states = {name: row["state"] for name, row in cells.items()}
    assert states == {phase["name"]: phase["state"] for phase in content["phases"]}
    assert states["2_context"] == "killed" and states["3_code"] == "failed" and states["3_mathematics"] == "to run"
    language = cells["1_language"]
    assert language["wall time"] == "3 min 50 s" and language["steps"] == "12" and language["tokens"] == "4,800"
    assert cells["2_context"]["steps"] == "5 of 20" and cells["3_mathematics"]["wall time"] == "–"
    record = content["curves"]["1_language"]["train"][-1]
    assert language["loss"] == f"{record['loss']:.4f}" and language["made"] == ""
    assert language["bits/byte"] == f"{content['curves']['1_language']['validation'][-1]['bits_per_byte']:.4f}"
    assert (
        "ended with <status> 1" in page.text and "8 of 10" not in page.text and "7 of 10 phases are done" in page.text
    )


def test_what_ran_names_versions_and_who_differs(full):
    _, content, page = full
    found = dict(page.tables["run"][1:])
    assert found["commit"] == "0123abc" and found["processor"] == "A <fast> one" and found["versions"] == "torch 2.1"
    assert found["cpus"].startswith("4 (0_prepare, 0_mix); 2 (1_language, ") and found["processes"] == "2"
    assert found["first start"] == "2026-11-20 08:00:00 UTC" and content["environment"]["processes"]["2"]


def test_tokens_of_corpora(full):
    _, content, page = full
    header, *rows = page.tables["tokens"]
    assert header == ["phase", "code", "mathematics", "all"]
    assert rows[0] == ["1_language", "3,600 (1.5 x)", "1,200", "4,800"]
    assert content["tokens"]["2_context"]["code"] == {"tokens": 1500, "epochs": 0.625}


def test_mix_and_merge(full):
    _, content, page = full
    weights = content["mixes"]["0_mix"]["report"]["weights"]
    assert [row[0] for row in page.tables["mix"][1:3]] == [row["name"] for row in weights] == ["code", "mathematics"]
    header, *rows = page.tables["merge"][:6]
    assert header == ["model", "prose", "code", "mean", "dev", "weights"]
    record = {row["name"]: row for row in content["merges"]["3_merge"]["rows"]}
    assert [row[0] for row in rows] == list(record)
    assert rows[-1][3] == f"{record['searched average']['mean']:.4f}" and rows[0][-1] == "–"
    assert rows[1][-1] == "code 1.000" and "mathematics 0.7" in rows[-1][-1]
    assert "Warning: branch mathematics is far away" in page.text


def test_evaluation_beside_published_scores(full):
    _, _, page = full
    header, *rows = page.tables["evaluation"]
    assert header == ["task", "metric", "6_evaluate", "MobileLLM-Pro", "Gemma 3-1B", "Llama 3.2-1B"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["HellaSwag"] == ["acc_norm", "50.00 ± 1.00", "67.11", "62.30", "65.69"]
    assert cells["Natural Questions"] == ["exact_match", "12.50", "15.76", "9.48", "5.48"]
    assert cells["wikitext"] == ["word_perplexity", "31.50", "–", "–", "–"] and cells["PIQA"][:2] == ["–", "–"]
    assert cells["Needle in a haystack"][1:] == ["66.67", "100.00", "–", "96.80"] and "a_group" not in cells
    assert cells["mean of the 2 that all have"][1:3] == ["31.25", f"{(67.11 + 15.76) / 2:.2f}"]


def test_sizes_are_those_on_disk(full):
    out, content, page = full
    sizes = {(size["phase"], size["what"]): size for size in content["sizes"]}
    step = sizes["1_language", "checkpoint"]
    assert step["parameters"] == 408 and step["dtypes"] == ["float32"] and step["weight_bytes"] == 4 * 408
    files = (out / step["path"]).iterdir()
    assert step["disk_bytes"] == sum(path.stat().st_size for path in files) > step["weight_bytes"]
    folder = sizes["1_folder", "Hugging Face"]
    assert folder["parameters"] == 8 and folder["weight_bytes"] == 16 and folder["dtypes"] == ["bfloat16"]
    exported = [size for size in content["sizes"] if size["what"] == "exported file"]
    assert [size["path"] for size in exported] == ["7_export/model.pte"] and exported[0]["disk_bytes"] == 2_500_000
    assert page.tables["sizes"][-1][:2] == ["7_export", "exported file"] and "2.50" in page.tables["sizes"][-1]


def test_the_newest_needle_test_is_drawn(full):
    _, content, page = full
    found = content["needles"]["2_context"]
    assert list(found["score_by_step"]) == ["2", "4"] and found["last"]["lengths"] == [500, 700]
    assert "step 2: 66.67, step 4: 66.67" in page.text


def test_before_anything_ran_each_section_says_so(empty):
    out, content, page = empty
    assert list(page.tables) == [key for key in SECTIONS if key != "evaluation"] and not page.images
    assert page.text.count(" yet") == 7 and "No weights were found yet: waiting for 0_mix (to run)." in page.text
    assert "waiting for 4 phases of kind train." in page.text
    assert [phase["state"] for phase in content["phases"]] == ["to run"] * 10
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json"}


def test_kinds_that_are_missing_or_not_known_here(tmp_path: Path):
    (tmp_path / "any.toml").write_text("")
    path = tmp_path / "pipeline.toml"
    tables = "".join(f'[[phase]]\nname = "{name}"\nkind = "train"\nconfig = "any.toml"\n' for name in "ab")
    path.write_text(f'output = "{tmp_path / "out"}"\n{tables}')
    pipeline = load_pipeline(path)
    pipeline = replace(pipeline, phases=(pipeline["a"], replace(pipeline["b"], kind="instruct")))
    write_run(tmp_path / "out" / "b", 4, seed=0)
    page = Page(run_page(make_run_report(pipeline), {}))
    assert "This pipeline has no phase of kind merge." in page.text
    assert page.tables["phases"][2][:3] == ["b", "instruct", "to run"] and len(page.images) == 2
    assert page.tables["tokens"][1] == ["b", "1,200 (0.5 x)", "400", "1,600"]


def test_losses_that_are_no_numbers_and_long_runs(tmp_path: Path):
    pipeline = write_pipeline(tmp_path)
    folder = tmp_path / "out" / "1_language"
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 3 * CURVE_POINTS + 3):
            loss = float("nan") if step > 3 * CURVE_POINTS else 1 / step
            file.write(json.dumps({"kind": "train", "step": step, "loss": loss, "distill/ce": loss}) + "\n")
        file.write('{"kind": "train", "st')
    report(str(pipeline))
    content = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    curve = content["curves"]["1_language"]["train"]
    assert [record["step"] for record in curve[:3]] == [1, 5, 9] and len(curve) <= CURVE_POINTS
    assert curve[-1] == {"step": 3 * CURVE_POINTS + 2, "loss": "nan", "distill/ce": "nan"}
    assert ">nan<" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("2_context/needle/step-3.json", "{}", "step-3.json: expected the result of a needle test, found no score"),
        ("3_merge/merge.json", "[]", "merge.json: expected an object, found list"),
        ("6_evaluate/results.json", '{"results": [1]}', "results.json: expected lm-eval's"),
        ("0_mix/mix_report.json", "{", "mix_report.json: not valid JSON"),
        ("1_language/checkpoint/step-1/.metadata", "no pickle", "step-1/.metadata cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        report(str(write_pipeline(tmp_path)))
    assert not (tmp_path / "out" / "report.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>addEventListener("load", () => {
const images = [...document.images];
document.body.append(`measured ${document.documentElement.scrollWidth} of ${innerWidth} pixels, ` +
`${images.filter(image => image.naturalWidth > 200).length} of ${images.length} images`); });</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("which", ["full", "empty"])
def test_a_browser_shows_it(which: str, request: pytest.FixtureRequest, tmp_path: Path):
    from matplotlib.image import imread

    out, _, parsed = request.getfixturevalue(which)
    page, picture = tmp_path / "measured.html", tmp_path / "page.png"
    page.write_text((out / "report.html").read_text().replace("</body>", f"{MEASURE}</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars", "--window-size=800,2400"]
    command += [f"--screenshot={picture}", "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0 and picture.is_file(), result.stderr[-2000:]
    pixels = imread(picture)[..., :3]
    inked_rows = (np.abs(pixels - 1).max(-1) > 0.3).any(1).mean()
    assert pixels.shape == (2400, 800, 3) and inked_rows > (0.4 if which == "full" else 0.1), "blank"
    text = result.stdout
    assert "Needle in a haystack" in text and ("66.67" in text) == (which == "full")
    found = re.search(r"measured (\d+) of (\d+) pixels, (\d+) of (\d+) images", text)
    assert found is not None
    width, window, shown, images = map(int, found.groups())
    assert width <= window == 800, "nothing is wider than the window"
    assert shown == images == len(parsed.images), "every picture is shown"
