"""The report: the page holds all sections and the numbers of the JSON file, needs no other file, is written whole."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mobilellm_pro.data_mix.influence_curve import InfluenceCurve, utility_curve
from mobilellm_pro.data_mix.report_page import write_report
from mobilellm_pro.data_mix.report_record import MixReport, make_report, prediction_record
from mobilellm_pro.data_mix.weights import MixProblem, baseline_weights, static_weights
from mobilellm_pro.static_page import DIGITS

NAMES, TOKENS = ("fineweb_edu", "starcoder", "<wiki> & co"), (900, 90, 10)
DOMAINS = ("prose", "code")
SECTIONS = [
    "weights",
    "baselines",
    "influence",
    "utility_curves",
    "curves",
    "predictions",
    "scores",
    "settings",
    "notes",
]


def random_curve(rng: np.random.Generator) -> InfluenceCurve:
    return InfluenceCurve(np.array([10, 100, 1000]), rng.normal(size=(3, 2)) * 1e-4, rng.random((3, 2)) * 1e-8)


def full_report() -> MixReport:
    rng = np.random.default_rng(0)
    problem = MixProblem(NAMES, TOKENS, train_tokens=500, temperature=0.3)
    result = static_weights(problem, np.array([0.1, 0.3, 0.2]), rng.normal(size=(9, 3)) / 5)
    losses = 3 + rng.normal(size=(12, 2))
    losses[:, 1] = 2.5
    predicted = losses + rng.normal(size=(12, 2)) / 4
    return make_report(
        "A mix <of three>",
        result,
        baseline_weights(NAMES, TOKENS),
        influence=rng.normal(size=(3, 2)) * 1e-4,
        domains=DOMAINS,
        curves={name: random_curve(rng) for name in NAMES},
        values=[0.75, 0.25],
        predictions=prediction_record(DOMAINS, [f"run{n}" for n in range(12)], predicted, losses),
        predicted_utility={"ours": -2.345678, "uniform": -2.5, "natural": -2.4},
        scores={"gaussian_process": 0.9876, "linear": 0.8},
        settings={"temperature": 0.3, "epoch_cap": 4.0},
        notes=["Losses of models with a million parameters & no more."],
    )


class Page(HTMLParser):
    """Tables by section as rows of texts, sources of images, and every tag that stayed open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section, self.tables, self.images, self.open, self.links = "", {}, [], [], []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "section":
            self.section = values["id"]
            self.tables[self.section] = []
        if tag == "tr":
            self.tables[self.section].append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")
        if tag == "img":
            self.images.append(values["src"])
        self.links += [values[key] for key in ("href", "src") if key in values and tag != "img"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[self.section][-1][-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, Page]:
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(full_report(), folder)
    content = json.loads((folder / "mix_report.json").read_text())
    return folder, content, Page((folder / "mix_report.html").read_text())


def shown(value: float) -> str:
    return f"{value:.{DIGITS}g}"


def test_page_has_every_section_and_needs_no_other_file(written):
    folder, _, page = written
    assert list(page.tables) == SECTIONS and not page.open
    assert not page.links and "http" not in (folder / "mix_report.html").read_text()
    assert "A mix <of three>" in page.text and "no more." in page.text


def test_images_of_the_page_are_the_plots(written):
    folder, _, page = written
    assert len(page.images) == 5
    prefix = "data:image/png;base64,"
    assert all(image.startswith(prefix) for image in page.images)
    inlined = [base64.b64decode(image.removeprefix(prefix)) for image in page.images]
    plots = ["weights", "influence", "utility_curves", "curves", "predictions"]
    assert inlined == [(folder / f"mix_report_{name}.png").read_bytes() for name in plots]
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in inlined)


def test_numbers_of_the_page_are_those_of_the_json_file(written):
    _, content, page = written
    header, *rows = page.tables["weights"]
    for row, record in zip(rows, content["weights"], strict=True):
        assert row[0] == record["name"]
        for key, cell in zip(header[1:], row[1:], strict=True):
            assert cell == (shown(record[key]) if isinstance(record[key], float) else str(record[key])), key
    header, *rows = page.tables["baselines"]
    mixtures = {"ours": [record["weight"] for record in content["weights"]], **content["baselines"]}
    assert header[1:] == list(mixtures) == ["ours", "uniform", "natural"]
    for number, row in enumerate(rows[:-1]):
        assert row[1:] == [shown(shares[number]) for shares in mixtures.values()]
    assert rows[-1][1:] == [shown(content["predicted_utility"][name]) for name in mixtures]
    for row, name, values in zip(page.tables["influence"][1:], NAMES, content["influence"], strict=True):
        assert row == [name, *map(shown, values)]
    prose, code = (content["predictions"][target]["rank_correlation"] for target in DOMAINS)
    assert page.tables["predictions"][1:] == [["prose", "12", shown(prose)], ["code", "12", "constant"]]
    assert 0.5 < prose <= 1 and code is None
    assert dict(page.tables["scores"][1:]) == {name: shown(value) for name, value in content["scores"].items()}
    assert dict(page.tables["settings"][1:]) == {"temperature": "0.3", "epoch_cap": "4"}


def test_utility_curves_weight_the_domains_and_stand_beside_what_they_are_made_of(written):
    _, content, page = written
    for name in NAMES:
        curve, together = content["curves"][name], content["utility_curves"][name]
        mean, spread = np.array(curve["mean"]), np.sqrt(curve["variance"])
        assert together["tokens"] == curve["tokens"] == [10, 100, 1000]
        np.testing.assert_allclose(together["mean"], 0.75 * mean[:, 0] + 0.25 * mean[:, 1])
        np.testing.assert_allclose(together["deviation"], 0.75 * spread[:, 0] + 0.25 * spread[:, 1])
    assert "Method: tilt." in page.text and "at most (those of the domains are added)" in page.text
    curve = random_curve(np.random.default_rng(0))
    for values in ([1.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="expected 2 numbers of at least 0"):
            utility_curve(curve, values)


def test_report_is_read_back_and_written_again_alike(written, tmp_path: Path):
    folder, _, _ = written
    files = write_report(MixReport.from_json((folder / "mix_report.json").read_text()), tmp_path)
    assert [path.name for path in files][-1] == "mix_report.html" and len(files) == 7
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}, "no temporary file remains"
    for path in files:
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_without_simulation_and_calibration_the_page_says_so(tmp_path: Path):
    problem = MixProblem(NAMES, TOKENS, train_tokens=500, temperature=0.3)
    report = make_report("Bare", static_weights(problem, np.zeros(3)), baseline_weights(NAMES, TOKENS))
    files = write_report(report, tmp_path)
    page = Page((tmp_path / "mix_report.html").read_text())
    assert [path.name for path in files] == ["mix_report.json", "mix_report_weights.png", "mix_report.html"]
    assert list(page.tables) == SECTIONS and page.text.count("not part of this run") == 7


def test_numbers_that_json_does_not_have_leave_no_file(tmp_path: Path):
    report = full_report()
    report.scores["neural"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(report, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": []}, "at least one source"),
        ({"baselines": {"uniform": [0.5, 0.5]}}, "baselines.uniform: 2 weights for 3 sources"),
        ({"influence": [[1.0, 2.0]] * 2}, "influence: expected 3 rows of 2"),
        ({"curves": {"other": {"tokens": [], "mean": []}}}, "curves.other: no source"),
        ({"utility_curves": {"other": {"tokens": []}}}, "utility_curves.other: no source"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message: str):
    content = {**json.loads(full_report().to_json()), **changes}
    with pytest.raises(ValueError, match=message):
        MixReport.from_json(json.dumps(content))


def test_files_that_are_no_report_are_refused():
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        MixReport.from_json("{", "a.json")
    with pytest.raises(ValueError, match=r"a\.json: expected an object with keys"):
        MixReport.from_json('{"title": "x"}', "a.json")
    rows = json.loads(full_report().to_json())["weights"]
    with pytest.raises(ValueError, match="'starcoder' occurs twice"):
        MixReport("x", [rows[1], rows[1]], {})
