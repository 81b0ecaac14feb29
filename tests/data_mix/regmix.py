"""RegMix's public measurements (Liu et al. 2024, MIT, `tests/assets/regmix`): mixtures of 17 domains of the Pile and
the losses on 13 of them of a model with a million parameters, one row a run; 512 runs to fit and 256 to test."""

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).parents[1] / "assets/regmix"


class Runs(NamedTuple):
    domains: tuple[str, ...]
    weights: np.ndarray
    targets: tuple[str, ...]
    losses: np.ndarray

    def first(self, count: int) -> "Runs":
        return Runs(self.domains, self.weights[:count], self.targets, self.losses[:count])


def load_runs(split: str) -> Runs:
    """`split`: "train" or "test"."""
    (domains, weights), (targets, losses) = (_table(f"{split}_{part}_1m.csv.gz") for part in ("mixture", "pile_loss"))
    return Runs(domains, weights, targets, losses)


def _table(name: str) -> tuple[tuple[str, ...], np.ndarray]:
    with gzip.open(FOLDER / name, "rt") as file:
        header = file.readline().strip().split(",")
        return tuple(column.split("the_pile_")[1] for column in header[1:]), np.loadtxt(file, delimiter=",")[:, 1:]
