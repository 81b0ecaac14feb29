"""The steps after the proxies, on losses that are made up: intervals, lost files, and a folder of the caller's."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm_pro.__main__ import is_users_mistake, main, run_verb
from mobilellm_pro.data_mix.report_page import write_report
from mobilellm_pro.data_mix.report_record import MixReport
from mobilellm_pro.pipeline import data_mix_fit
from mobilellm_pro.pipeline.data_mix import mix
from mobilellm_pro.pipeline.data_mix_folder import CALIBRATION
from mobilellm_pro.pipeline.data_mix_plan import load_mix_plan
from mobilellm_pro.pipeline.data_mix_proxies import plan_proxies
from tests.data.synthetic import make_corpora
from tests.pipeline.test_data_mix_plan import write_plan
from tests.training.small_world import SmallWorld

PROXIES = 9
FILES = ("weights.toml", "weights.json", "mix_report.json", "mix_report.html", "mix_report_weights.png")


@pytest.fixture(scope="module")
def plan(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan whose folder, `out/mix`, holds a simulation and proxies' losses: the more of b the better, and noise."""
    folder = tmp_path_factory.mktemp("weights")
    make_corpora(folder, ("a", "b", "exam"), documents=300)
    path = write_plan(folder, world)
    path.write_text(path.read_text().replace("count = 5", f"count = {PROXIES}").replace("draws = 3", "draws = 6"))
    mix(str(path), only="simulate")
    write_calibration(path, folder / "out/mix")
    return path


def write_calibration(plan: Path, folder: Path) -> None:
    loaded, rng = load_mix_plan(plan), np.random.default_rng(0)
    rows = []
    for proxy in plan_proxies(loaded):
        bits = 3 - 0.2 * np.sqrt(proxy.weights[1]) + 0.005 * rng.normal(size=2)
        rows.append({"name": proxy.name, "weights": list(proxy.weights), "bits_per_byte": bits.tolist()})
    record = {"corpora": loaded.names, "domains": ["a", "exam"], "utility_weights": [0.25, 0.75], "tokens": 768}
    (folder / CALIBRATION).write_text(json.dumps({**record, "proxies": rows}))


def weights_of(plan: Path) -> list[dict[str, Any]]:
    return json.loads((plan.parent / "out/mix/weights.json").read_text())["weights"]


def test_intervals_are_over_fits_and_what_they_hold_possible(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, int]] = []

    def noted(fitted: Any, seed: int, **settings: Any) -> Any:
        seeds.append((fitted.seed, seed))
        return drawn_utility(fitted, seed, **settings)

    drawn_utility = data_mix_fit.drawn_utility
    monkeypatch.setattr(data_mix_fit, "drawn_utility", noted)
    mix(str(plan), only="weights")
    assert seeds == [(4 + draw, 4 + draw) for draw in range(6)], "other seeds than the plan's 3, each once"
    rows = weights_of(plan)
    assert rows[1]["weight"] > 0.5 and all(row["low"] < row["high"] for row in rows)
    assert all(row["low"] <= row["weight"] <= row["high"] for row in rows)
    page = (plan.parent / "out/mix/mix_report.html").read_text()
    assert "smoother than those measured" in page and "a draw from the posterior" in page


def test_without_draws_there_is_no_interval(plan: Path, tmp_path: Path) -> None:
    mix(str(plan), only="weights")
    drawn = weights_of(plan)
    good = plan.read_text()
    plan.write_text(good.replace("draws = 6", "draws = 0"))
    try:
        mix(str(plan), only="weights")
        rows = weights_of(plan)
    finally:
        plan.write_text(good)
    assert all(row["low"] == row["weight"] == row["high"] for row in rows)
    assert [row["weight"] for row in rows] == [row["weight"] for row in drawn], "draws move no weight"
    report = MixReport.from_json((plan.parent / "out/mix/mix_report.json").read_text())
    assert report.settings["fit"]["draws"] == 0 and report.weights == rows


def test_what_was_lost_is_made_again_alike(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plan.parent / "out/mix"
    mix(str(plan), only="weights")
    files = {name: (folder / name).read_bytes() for name in FILES}
    capsys.readouterr()
    mix(str(plan), only="weights")
    assert "weights: done" in capsys.readouterr().out
    for name in ("mix_report.html", "weights.toml", "weights.json"):
        (folder / name).unlink()
        mix(str(plan), only="weights")
        assert "weights: done" not in capsys.readouterr().out
        assert {name: (folder / name).read_bytes() for name in FILES} == files
    write_report(MixReport.from_json((folder / "mix_report.json").read_text()), tmp_path)
    for name in FILES[2:]:
        assert (tmp_path / name).read_bytes() == files[name], "the page and its plots come from the JSON file alone"


def test_a_kill_between_its_files_leaves_a_step_undone(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of other settings must not pass for those of the plan when it is changed back."""
    mix(str(plan), only="weights")
    good, before = plan.read_text(), (plan.parent / "out/mix/weights.toml").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(data_mix_fit, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        plan.write_text(good.replace("temperature = 0.1", "temperature = 0.01"))
        with pytest.raises(KeyboardInterrupt):
            mix(str(plan), only="weights")
    assert (plan.parent / "out/mix/weights.toml").read_bytes() != before
    plan.write_text(good)
    mix(str(plan), only="weights")
    assert (plan.parent / "out/mix/weights.toml").read_bytes() == before


def test_the_folder_may_be_the_callers(plan: Path, tmp_path: Path) -> None:
    """As words of a command, and not beside the plan's own folder."""
    before = {path: path.stat().st_mtime_ns for path in (plan.parent / "out").rglob("*")}
    output = tmp_path / "elsewhere"
    run_verb(["mix", str(plan), "--output", str(output), "--only", "simulate"])
    write_calibration(plan, output)
    assert main(["mix", str(plan), "--output", str(output), "--only", "weights"]) == 0
    assert (output / "curves.npz").is_file() and all((output / name).is_file() for name in FILES)
    assert {path: path.stat().st_mtime_ns for path in (plan.parent / "out").rglob("*")} == before
    # A plan for the pipeline alone needs none of its own.
    bare, text = tmp_path / "bare.toml", plan.read_text().replace(f'output = "{plan.parent}/out/mix"', "")
    bare.write_text(text.replace('"job.toml"', f'"{plan.parent}/job.toml"'))
    assert load_mix_plan(bare, output=output).folder == output


@pytest.mark.parametrize("missing", [["numba"], ["sklearn"], ["numba", "sklearn"]])
def test_a_missing_extra_is_named(missing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first import, for any of the two, with the command that helps."""
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    names = " and ".join({"numba": "numba", "sklearn": "scikit-learn"}[name] for name in missing)
    for name in ("mobilellm_pro.data_mix.ngram_table", "mobilellm_pro.pipeline.data_mix"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=rf"needs {names}, which the extra `mix` .*mobilellm-pro\[mix\]") as error:
        __import__("mobilellm_pro.data_mix.ngram_table")
    assert is_users_mistake(error.value)
