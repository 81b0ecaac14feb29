"""What a needle test leaves in its folder, and how it goes on after a stop.

settings.json      what decides about prompts and answers; another start must agree with it
cells-rank0.jsonl  one line a finished cell, as soon as it is finished; one file a rank
needle.json        written by the rank that finds all cells finished: settings, scores, every cell
needle.png         the heat map

Ranks share nothing but this folder: cells are dealt out by their number and no rank waits for another, so there is no
process group that a slow rank could time out. A cell that is in any rank's file is not run again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.data.claimed_file import agree_on_settings
from mobilellm_pro.evaluation.needle_grid import Cell, CellResult, Grid
from mobilellm_pro.json_lines import append_record, read_records

SETTINGS, RESULT, PICTURE = "settings.json", "needle.json", "needle.png"


def agree_on_cells(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes settings.json, or compares with the one that is there.

    Raises:
        ValueError: they differ; names each difference.
    """
    said = "the cells in this folder were made with other settings"
    cure = "choose another --output, remove the folder, or start with its settings"
    agree_on_settings(folder / SETTINGS, settings, said=said, cure=cure)


def append_cell(folder: Path, rank: int, result: CellResult) -> None:
    """Adds a line to the rank's file."""
    append_record(folder / f"cells-rank{rank}.jsonl", _record(result))


def read_cells(folder: Path, cells: Sequence[Cell]) -> dict[int, CellResult]:
    """Number of a finished cell -> its result, of all ranks; a line that a kill cut short is left out."""
    results = {}
    for path in sorted(folder.glob("cells-rank*.jsonl")):
        for record in read_records(path):
            cell = cells[record["cell"]]
            kept = (record[key] for key in ("prompt_tokens", "value", "answer", "correct"))
            results[cell.index] = CellResult(cell, *kept)
    return results


def write_result(folder: Path, result: Mapping[str, Any], name: str = RESULT) -> None:
    """Writes needle.json (or `name`) by rename; two ranks that finish at once write the same."""
    write_atomically(folder / name, json.dumps(result, indent=2) + "\n")


def summary(grid: Grid, results: Sequence[CellResult]) -> dict[str, Any]:
    """Scores of a finished grid, and its cells.

    Returns:
        correct and total (cells), score (percent), lengths, depths (percent), found (for each length a list with the
        correct cells at each depth), by_length and by_depth (percent), and cells.
    """
    assert len(results) == len(grid.cells())
    depths = grid.depths
    found = [[0] * len(depths) for _ in grid.lengths]
    for result in results:
        found[grid.lengths.index(result.cell.length)][depths.index(result.cell.depth)] += result.correct
    correct, total = sum(map(sum, found)), len(results)
    per_length, per_depth = grid.num_needles * len(depths), grid.num_needles * len(grid.lengths)
    return {
        "correct": correct,
        "total": total,
        "score": 100 * correct / total,
        "needles_per_place": grid.num_needles,
        "lengths": list(grid.lengths),
        "depths": depths,
        "found": found,
        "by_length": [100 * sum(row) / per_length for row in found],
        "by_depth": [100 * sum(column) / per_depth for column in zip(*found, strict=True)],
        "cells": [_record(result) for result in sorted(results, key=lambda result: result.cell.index)],
    }


def table(scores: Mapping[str, Any]) -> str:
    """Markdown: a row a length, a column a depth, needles found; the last column and row are percent."""
    per_place = scores["needles_per_place"]
    head = ["tokens", *(f"{depth:g} %" for depth in scores["depths"]), "all"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for length, row, percent in zip(scores["lengths"], scores["found"], scores["by_length"], strict=True):
        places = [f"{count}/{per_place}" for count in row]
        lines.append("| " + " | ".join([f"{length:,}", *places, f"{percent:.1f}"]) + " |")
    lines.append("| " + " | ".join(["all", *(f"{p:.1f}" for p in scores["by_depth"]), f"{scores['score']:.2f}"]) + " |")
    return "\n".join(lines)


def _record(result: CellResult) -> dict[str, Any]:
    cell = asdict(result.cell)
    return {"cell": cell.pop("index"), **cell, **{k: v for k, v in result._asdict().items() if k != "cell"}}
