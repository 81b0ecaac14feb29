"""Influence of every single sample as parquet files, for whoever wants to filter a corpus by it.

Columns: `source` (name), `sample` (its number in the source), `tokens`, and for each domain `influence <domain>`, nats
per token of the pool, not divided by the tokens of the sample. Rows stand in the order of the simulation.

    pyarrow.dataset.dataset("outputs/mix/influence").to_table(filter=pyarrow.compute.field("influence code") > 0)

A file holds the samples between two saved states and is named by the first of them in the simulation, so a resumed
simulation writes the same files.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from mobilellm_pro.atomic_file import replacement
from mobilellm_pro.data_mix.simulation_order import Sample

PATTERN = "samples-*.parquet"


class InfluenceExport:
    """Writes the files of one simulation."""

    def __init__(self, folder: Path, sources: Sequence[str], domains: Sequence[str], num_samples: int) -> None:
        """Makes the folder ready for the samples from number `num_samples` of the simulation on.

        Args:
            folder: made if need be; files of samples that are still to come are removed.
            sources, domains: their names.
            num_samples: that an interrupted simulation has exported already; 0 at the beginning.

        Raises:
            ValueError: at the beginning the folder has files of samples, or later not all that it should.
        """
        self._folder, self._sources, self._domains = folder, list(sources), list(domains)
        self._first = num_samples
        self._rows: list[tuple[int, int, int]] = []
        self._influence: list[np.ndarray] = []
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(folder.glob(PATTERN))
        if files and not num_samples:
            raise ValueError(f"{folder}: has samples of another simulation ({files[0].name}): delete them")
        kept = [file for file in files if int(file.stem.split("-")[1]) < num_samples]
        held = sum(parquet.read_metadata(file).num_rows for file in kept)
        if held != num_samples:
            raise ValueError(
                f"{folder}: has {held} of the {num_samples} samples that the simulation has read: put the files back, "
                "or delete them and the saved state"
            )
        for stale in (*set(files) - set(kept), *folder.glob(f"{PATTERN}.*.tmp")):
            stale.unlink()

    def add(self, sample: Sample, influence_K: np.ndarray) -> None:
        """Takes one sample and its influence, float64 [K]."""
        self._rows.append((sample.source, sample.number, len(sample.ids)))
        self._influence.append(influence_K)

    def write(self) -> None:
        """Writes what was added since the last time as one file, by rename."""
        if not self._rows:
            return
        source, sample, tokens = np.array(self._rows, np.int64).T
        influence_BK = np.stack(self._influence)
        columns = {
            "source": pyarrow.DictionaryArray.from_arrays(source.astype(np.int32), self._sources),
            "sample": sample,
            "tokens": tokens.astype(np.int32),
        } | {f"influence {name}": influence_BK[:, number] for number, name in enumerate(self._domains)}
        path = self._folder / f"samples-{self._first:012d}.parquet"
        with replacement(path) as temporary:
            parquet.write_table(pyarrow.table(columns), temporary)
        self._first += len(self._rows)
        self._rows, self._influence = [], []
