"""What a needle test counts, prints and draws."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.needle import run_cells
from mobilellm_pro.evaluation.needle_grid import Grid
from mobilellm_pro.evaluation.needle_haystack import Filler
from mobilellm_pro.evaluation.needle_plot import found_shares, plot_heat_map, plot_models
from mobilellm_pro.evaluation.needle_results import summary, table
from tests.data.synthetic import DEBUG_TOKENIZER

TOKENIZER = Tokenizer.load(str(DEBUG_TOKENIZER))


def reader(knows: Callable[[int, float], bool]) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Greedy decoding of a model that reads the number if it `knows` it at that length and place, else says another."""

    def generate(prompts: torch.Tensor, count: int) -> torch.Tensor:
        rows = []
        for ids in prompts.tolist():
            text = TOKENIZER.decode(ids[1:])
            before, _, rest = text.partition(" is: ")
            value = rest[:7] if knows(len(ids), len(before) / len(text)) else str(9_999_999 - int(rest[:7]))
            rows.append((TOKENIZER.encode(f" {value}.") + [TOKENIZER.eos_id] * count)[:count])
        return torch.tensor(rows)

    return generate


def test_scores_count_what_was_found() -> None:
    """A model that reads the first half of texts of up to 500 tokens, and nothing in longer ones."""
    grid = Grid(lengths=(400, 500, 700), num_depths=4, num_needles=3)
    generate = reader(lambda tokens, place: tokens <= 500 and place < 0.5)
    results = list(run_cells(generate, TOKENIZER, grid, grid.cells(), Filler(), batch=2))
    scores = summary(grid, results)
    assert scores["found"] == [[3, 3, 0, 0], [3, 3, 0, 0], [0, 0, 0, 0]]
    assert (scores["correct"], scores["total"]) == (12, 36) and scores["score"] == pytest.approx(100 / 3)
    assert scores["by_length"] == [50, 50, 0] and scores["by_depth"] == pytest.approx([200 / 3, 200 / 3, 0, 0])
    assert [cell["cell"] for cell in scores["cells"]] == list(range(36))
    lines = table(scores).splitlines()
    assert lines[0].split() == "| tokens | 0 % | 33.3333 % | 66.6667 % | 100 % | all |".split()
    assert lines[2] == "| 400 | 3/3 | 3/3 | 0/3 | 0/3 | 50.0 |" and lines[-1].endswith("| 33.33 |")
    shares = found_shares(scores)
    np.testing.assert_array_equal(shares, [[100, 100, 0], [100, 100, 0], [0, 0, 0], [0, 0, 0]])


def test_the_heat_map_shows_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    grid = Grid(lengths=(400, 500, 700), num_depths=4, num_needles=1)
    scores = summary(grid, list(run_cells(reader(lambda *_: True), TOKENIZER, grid, grid.cells(), Filler())))
    shown = []
    plain = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, array, **more: shown.append(array) or plain(axes, array, **more))
    plot_heat_map(scores, "a model", tmp_path / "needle.png")
    assert shown[0].shape == (4, 3) and (shown[0] == 100).all()
    header = (tmp_path / "needle.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and min(struct.unpack(">II", header[16:])) > 300
    assert [path.name for path in tmp_path.iterdir()] == ["needle.png"]


def test_several_models_in_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    shown, names = [], []
    show, ticks = Axes.imshow, Axes.set_yticks
    monkeypatch.setattr(Axes, "imshow", lambda axes, array, **more: shown.append(array) or show(axes, array, **more))
    monkeypatch.setattr(
        Axes,
        "set_yticks",
        lambda axes, at, text=(), **more: names.append(text) or ticks(axes, at, text or None, **more),
    )
    plot_models({"one": [100.0, 50.0], "two": [0.0, 25.0]}, [400, 800], "both", tmp_path / "models.png")
    np.testing.assert_array_equal(shown[0], [[100, 50], [0, 25]])
    assert ["one", "two"] in names and [path.name for path in tmp_path.iterdir()] == ["models.png"]
