"""Tables of several evaluations: what they show, when a difference counts, and what cannot be compared."""

import itertools
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm_pro.evaluation import paired_difference as paired
from mobilellm_pro.evaluation.comparison import compare_evaluations, model_names
from mobilellm_pro.evaluation.comparison_plot import radar
from mobilellm_pro.evaluation.published_scores import MODELS, QUANTIZED_MODELS, SCORES
from mobilellm_pro.evaluation.scored_documents import read_evaluation

NAMES = {"hellaswag": "HellaSwag", "boolq": "BoolQ", "mmlu": "MMLU"}


def write_evaluation(folder: Path, columns: dict[str, Sequence[float]], *, suite: str = "base", **more: Any) -> Path:
    """An evaluation whose documents have these scores, as the `evaluate` verb leaves it."""
    (folder / "samples").mkdir(parents=True)
    content: dict[str, Any] = {}
    for key, scores in columns.items():
        mean, stderr = paired.mean_and_error(np.array(scores, dtype=np.float64))
        content[key] = {"name": NAMES.get(key, key), "metric": "acc,none", "score": mean, "stderr": stderr,
                        "documents": len(scores), "shots": 0}  # fmt: skip
        lines = [
            {"task": f"{key}_{number % 2}", "doc_id": number // 2, "doc_hash": f"{key}{number}", "score": score,
             "text": f"Text {number}\u2028with a line end"} for number, score in enumerate(scores)
        ]  # fmt: skip
        write_samples(folder, key, lines)
    mean = sum(one["score"] for one in content.values()) / len(content)
    averages = {"average of all": {"score": mean, "columns": [*columns]}}
    results = {"suite": suite, "checkpoint": f"outputs/{folder.name}", "results": {}, "columns": content,
               "averages": averages, "limit": None, **more}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_samples(folder: Path, key: str, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "samples" / f"{key}.jsonl").write_text(text, encoding="utf-8")


def read_samples(folder: Path, key: str) -> list[dict[str, Any]]:
    text = (folder / "samples" / f"{key}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def change(folder: Path, **changes: Any) -> None:
    """Overwrites entries of results.json; `column_hellaswag_shots=5` means that of a column."""
    path = folder / "results.json"
    content = json.loads(path.read_text())
    for name, value in changes.items():
        if name.startswith("column_"):
            _, key, what = name.split("_")
            content["columns"][key][what] = value
        else:
            content[name] = value
    path.write_text(json.dumps(content))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """The second is better at hellaswag (8 of 40 gained), and loses as much as it gains at boolq."""
    first = {"hellaswag": [1.0] * 20 + [0.0] * 20, "boolq": [1.0, 0.0] * 10}
    other = {"hellaswag": [1.0] * 28 + [0.0] * 12, "boolq": [0.0, 1.0, 1.0, 0.0] * 5}
    return [write_evaluation(tmp_path / "one", first), write_evaluation(tmp_path / "two", other)]


def test_the_record_and_the_table(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = compare_evaluations(folders, tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.json", "comparison.md"]
    assert json.loads((out / "comparison.json").read_text()) == record
    assert (out / "comparison.md").read_text() == capsys.readouterr().out
    assert list(record["models"]) == ["one", "two"] and record["models"]["two"]["checkpoint"] == "outputs/two"
    hellaswag, boolq = record["columns"]["hellaswag"], record["columns"]["boolq"]
    assert hellaswag["scores"]["two"]["score"] == 0.7 and hellaswag["documents"] == 40
    found, none = hellaswag["differences"]["two"], boolq["differences"]["two"]
    assert found["difference"] == pytest.approx(0.2) and found["test"] == "mcnemar"
    assert found["stderr"] == pytest.approx(np.std([1.0] * 8 + [0.0] * 32, ddof=1) / math.sqrt(40))
    assert found["p_value"] == pytest.approx(2 / 2**8) and found["p_holm"] == pytest.approx(4 / 2**8)
    assert found["significant"] and none["difference"] == 0 and none["p_value"] == 1 and not none["significant"]
    average = record["averages"]["average of all"]
    errors = [one["differences"]["two"]["stderr"] for one in (hellaswag, boolq)]
    assert average["differences"]["two"] == {
        "difference": pytest.approx(0.1), "stderr": pytest.approx(math.hypot(*errors) / 2)}  # fmt: skip
    ours = [SCORES[key][1][0] for key in ("hellaswag", "boolq")]
    assert average["published"][MODELS[0]] == pytest.approx(np.mean(ours) / 100)


def test_the_pages_say_the_same(folders: list[Path], tmp_path: Path) -> None:
    compare_evaluations(folders, tmp_path / "out")
    markdown, page = ((tmp_path / "out" / name).read_text() for name in ("comparison.md", "comparison.html"))
    row = next(line for line in markdown.splitlines() if line.startswith("| HellaSwag"))
    scores = "50.00 ± 8.01 | 70.00 ± 7.34 | +20.00 ± 6.41 * | 67.11 | 62.30 | 65.69 | 64.89 | 65.10"
    assert row == f"| HellaSwag | acc,none | 0 | {scores} |"
    header = next(line for line in markdown.splitlines() if line.startswith("| task | metric"))
    assert header.count("(published)") == 5 and "two − one" in header
    assert "| BoolQ | two | 20 | +0.00 ± 16.22 | 1 | 1 | mcnemar |" in markdown
    for text in ("+20.00 ± 6.41 *", "67.11", "outputs/two", "<h2>Tests against one</h2>"):
        assert text in page
    assert "Radar" not in page and "<script" not in page and "src=" not in page


def test_the_order_of_lines_does_not_matter(folders: list[Path], tmp_path: Path) -> None:
    expected = compare_evaluations(folders, tmp_path / "out")
    for key in ("hellaswag", "boolq"):
        write_samples(folders[1], key, read_samples(folders[1], key)[::-1])
    assert compare_evaluations(folders, tmp_path / "out") == expected


def test_three_models_and_scores_between_0_and_1(tmp_path: Path) -> None:
    """Each is tested against the first, with its own correction; other scores than 0 and 1 are permuted."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.5, 30)
    columns = {"mmlu": base.tolist(), "boolq": [0.0, 1.0] * 10}
    better = {"mmlu": (base + rng.uniform(0, 0.2, 30)).tolist(), "boolq": [0.0, 1.0] * 10}
    folders = [write_evaluation(tmp_path / name / "6_evaluate", scores)
               for name, scores in (("a", columns), ("b", columns), ("c", better))]  # fmt: skip
    record = compare_evaluations(folders, tmp_path / "out")
    assert list(record["models"]) == ["a/6_evaluate", "b/6_evaluate", "c/6_evaluate"]
    found = record["columns"]["mmlu"]["differences"]
    assert found["b/6_evaluate"]["p_value"] == 1 and not found["b/6_evaluate"]["significant"]
    assert found["c/6_evaluate"]["test"] == "permutation" and found["c/6_evaluate"]["significant"]
    assert found["c/6_evaluate"]["p_holm"] == pytest.approx(2 / 10_001)
    assert record["columns"]["mmlu"]["published"] == {} and record["averages"]["average of all"]["published"] == {}


def test_a_score_that_is_no_mean_is_noted(folders: list[Path], tmp_path: Path) -> None:
    assert compare_evaluations(folders, tmp_path / "out")["notes"] == []
    change(folders[0], column_boolq_score=0.61)
    notes = compare_evaluations(folders, tmp_path / "out")["notes"]
    assert len(notes) == 1 and notes[0].startswith("boolq: the score is not the mean")
    assert notes[0] in (tmp_path / "out/comparison.html").read_text().replace("&#x27;", "'")


def test_instruct_has_a_radar_and_scores_of_its_own(tmp_path: Path) -> None:
    columns = {key: [1.0, 0.0, 1.0] for key in ("hellaswag", "boolq", "mmlu")}
    folders = [write_evaluation(tmp_path / name, columns, suite="instruct") for name in "ab"]
    record = compare_evaluations(folders, tmp_path / "out")
    image = (tmp_path / "out/radar.png").read_bytes()
    assert image.startswith(b"\x89PNG") and min(struct.unpack(">II", image[16:24])) > 300
    assert "data:image/png;base64," in (tmp_path / "out/comparison.html").read_text()
    published = {key: one["published"] for key, one in record["columns"].items()}
    assert published["hellaswag"] == {MODELS[0]: pytest.approx(0.584), MODELS[2]: pytest.approx(0.412)}
    assert len(published["mmlu"]) == 3 and published["boolq"] == {}
    assert "Table 7 of the technical report" in (tmp_path / "out/comparison.md").read_text()
    few = {key: columns[key] for key in ("hellaswag", "boolq")}
    folders = [write_evaluation(tmp_path / name, few, suite="instruct") for name in "cd"]
    compare_evaluations(folders, tmp_path / "few")
    assert not (tmp_path / "few/radar.png").exists() and (tmp_path / "few/comparison.html").exists()


def test_the_radar_draws_closed_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn, plain = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, *points, **more: drawn.append(points) or plain(axes, *points, **more)
    )
    radar(["a", "b", "c"], {"one": [10.0, 20.0, 30.0], "two": [0.0, 0.0, 0.0]})
    (angles, values), _ = drawn
    assert values == [10, 20, 30, 10] and angles == pytest.approx([0, 2 * math.pi / 3, 4 * math.pi / 3, 0])


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "suite": ({"suite": "instruct"}, "two: suite 'instruct', expected 'base' as in .*one"),
    "metric": ({"column_boolq_metric": "em"}, "two: columns.boolq.metric = 'em', expected 'acc,none'"),
    "shots": ({"column_boolq_shots": 5}, "two: columns.boolq.shots = 5, expected 0 as in"),
    "score": ({"column_boolq_score": "high"}, "columns.boolq: score = 'high', expected int or float"),
    "nan": ({"column_boolq_score": math.nan}, "columns.boolq: score = nan, expected int or float"),
    "documents": ({"column_boolq_documents": 21}, "boolq.jsonl: 20 documents, results.json says 21"),
    "averages": ({"averages": {}}, "two: other averages than .*one"),
    "average": ({"averages": {"x": {"score": 1.0, "columns": ["piqa"]}}}, "averages.x.columns: 'piqa' is no column"),
    "columns": ({"columns": []}, r"results.json: columns = \[\], expected dict"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_results_are_named(folders: list[Path], tmp_path: Path, mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    change(folders[1], **changes)
    with pytest.raises(ValueError, match=message):
        compare_evaluations(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_compared(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 evaluation folder.*, expected two or more"):
        compare_evaluations(folders[:1], tmp_path / "out")
    with pytest.raises(ValueError, match="given twice"):
        compare_evaluations([folders[0], str(folders[0])], tmp_path / "out")
    with pytest.raises(ValueError, match=r"results.json does not exist: expected the folder of a finished evaluation"):
        compare_evaluations([*folders, tmp_path], tmp_path / "out")
    unfinished = write_evaluation(tmp_path / "unfinished", {"boolq": [1.0] * 20})
    with pytest.raises(ValueError, match="unfinished: lacks hellaswag, which .*one has") as caught:
        compare_evaluations([*folders, unfinished], tmp_path / "out")
    assert "unfinished: other averages" in str(caught.value), "all problems at once"
    with pytest.raises(ValueError, match="unfinished: lacks hellaswag, which .*one has"):
        compare_evaluations([unfinished, folders[0]], tmp_path / "out")


def test_other_documents_are_named(folders: list[Path], tmp_path: Path) -> None:
    lines = read_samples(folders[1], "boolq")
    write_samples(folders[1], "boolq", [*lines[:3], lines[3] | {"doc_hash": "changed"}, *lines[4:]])
    message = "two: 'boolq' has other documents than in .*one: 0 missing, 0 more, 1 with another doc_hash "
    with pytest.raises(ValueError, match=message + r"\(as document 1 of boolq_1\): other data"):
        compare_evaluations(folders, tmp_path / "out")
    write_samples(folders[1], "boolq", [*lines[:-1], lines[-1] | {"doc_id": 77}])
    with pytest.raises(ValueError, match="1 missing, 1 more, 0 with another doc_hash .*: other data"):
        compare_evaluations(folders, tmp_path / "out")
    write_samples(folders[1], "boolq", lines[:5])
    change(folders[1], column_boolq_documents=5, limit=5)
    with pytest.raises(ValueError, match="15 missing, 0 more, .*: limit = 5 there and None here"):
        compare_evaluations(folders, tmp_path / "out")


def test_damaged_samples_are_named(folders: list[Path], tmp_path: Path) -> None:
    path = folders[1] / "samples/boolq.jsonl"
    lines = read_samples(folders[1], "boolq")
    for wrong, message in (
        ({"score": 1.5}, "score = 1.5, expected a fraction from 0 to 1"),
        ({"score": None}, "score = None, expected int or float"),
        ({}, "document 0 of boolq_0 stands there twice"),
    ):
        write_samples(folders[1], "boolq", [*lines, lines[0] | wrong])
        with pytest.raises(ValueError, match=f"line 21: {message}"):
            compare_evaluations(folders, tmp_path / "out")
    write_samples(folders[1], "boolq", lines)
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(ValueError, match="line 20: not JSON"):
        read_evaluation(folders[1]).documents("boolq")
    for damage, message in ((lambda: path.write_text(""), "no documents"), (path.unlink, "boolq.jsonl does not exist")):
        damage()
        with pytest.raises(ValueError, match=message):
            read_evaluation(folders[1]).documents("boolq")


def test_the_needle_test_has_published_scores(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / name, {"needle": [1.0, 0.0]}, suite="long") for name in "ab"]
    record = compare_evaluations(folders, tmp_path / "out")
    expected = {MODELS[0]: 1.0, MODELS[2]: 0.968, **dict(zip(QUANTIZED_MODELS, (0.9644, 0.9867), strict=True))}
    assert record["columns"]["needle"]["published"] == pytest.approx(expected)


def test_names_are_the_shortest_that_differ() -> None:
    assert model_names(["/x/a", "/x/b"]) == ["a", "b"]
    assert model_names(["/x/a/base", "/y/a/base", "/y/b/base"]) == ["x/a/base", "y/a/base", "y/b/base"]


@given(st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=50, deadline=None)
def test_mcnemar_counts_outcomes(wins: int, losses: int) -> None:
    """As many of the equally likely outcomes as are at least as far from the middle."""
    n = wins + losses
    extreme = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(wins - losses))
    assert paired.mcnemar(wins, losses) == pytest.approx(extreme / 2**n)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_sign_flips_are_near_all_sign_flips(numbers: list[int], seed: int) -> None:
    """Within five standard errors of the share over all 2^n signs; ties count in spite of rounding."""
    differences = np.array(numbers) / 10
    sums = [abs(sum(sign * one for sign, one in zip(signs, numbers)))
            for signs in itertools.product((-1, 1), repeat=len(numbers))]  # fmt: skip
    exact = sum(one >= abs(sum(numbers)) for one in sums) / len(sums)
    found = paired.sign_flips(differences, draws=4000, seed=seed)
    assert abs(found - exact) <= 5 * math.sqrt(exact * (1 - exact) / 4000) + 1 / 4000
    assert found == paired.sign_flips(differences, draws=4000, seed=seed)


def test_draws_in_blocks_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "_BLOCK_SIGNS", 70)
    assert paired.sign_flips(np.array([0.5] * 3), draws=4000) == pytest.approx(0.25, abs=0.05)
    assert paired.sign_flips(np.array([0.0, 0.0])) == 1


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.999))
@settings(max_examples=100, deadline=None)
def test_holm_rejects_from_the_smallest_on(p_values: list[float], alpha: float) -> None:
    adjusted, going_on, tries = paired.holm(p_values), True, len(p_values)
    for p, corrected in sorted(zip(p_values, adjusted)):
        going_on = going_on and p * tries <= alpha
        assert (corrected <= alpha) == going_on and p <= corrected <= 1
        tries -= 1


def test_paired_difference_and_its_error() -> None:
    found = paired.paired_difference(np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.4, 0.9]))
    assert found.difference == pytest.approx(0) and found.test == "permutation"
    assert found.stderr == pytest.approx(0.1 / math.sqrt(3)) and found.p_value == 1
    single = paired.paired_difference(np.array([0.0]), np.array([1.0]))
    assert (single.difference, single.stderr, single.p_value, single.test) == (1, None, 1, "mcnemar")
    assert paired.mean_error([0.3, 0.4]) == pytest.approx(0.25)
    assert paired.mean_error([0.3, None]) is None and paired.mean_error([]) is None
