"""The mixture as torchtitan's dataloader.

Global step k reads the sequences [k·G, (k + 1)·G) of the mixture, G the global batch size. Ranks, gradient accumulation
and workers only divide that range among them, so the state is one integer, the same on every rank, and a run may go on
with another number of ranks.

With `hidden` set, a micro-batch brings the teacher's hidden states of its rows along: workers read them from the cache
while the student trains.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import BaseDataLoader

from mobilellm_pro.config.job_config import Data, JobConfig
from mobilellm_pro.data.best_fit import BestFitRows
from mobilellm_pro.data.hidden_states import HiddenStateReader
from mobilellm_pro.data.mixture import Mixture, batch
from mobilellm_pro.data.packing import CorpusStream
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer

Row = tuple[dict[str, Tensor], Tensor]
"""({"input" [B, S], "document_ids" [B, S], "corpus" [B], "row" [B]}, labels [B, S]), of a mixture with a cache also
"teacher_hidden" [B, this rank's part of S, D]."""


def open_mixture(
    data: Data, split: str, seq_len: int, fingerprint: str | None = None, *, check_index: bool = True
) -> Mixture:
    """Opens all corpora of the configuration.

    Args:
        data: the [data] section.
        split: "train", "valid" or "dev".
        seq_len: tokens of a row.
        fingerprint: of the tokenizer that the corpora must have been prepared with.
        check_index: look at every document's place on disk; preflight has done so on each machine.

    Raises:
        ValueError: a damaged, empty or too small corpus, another tokenizer, clusters that it does not have, unusable
            weights.
    """
    rows: type[CorpusStream] | type[BestFitRows] = BestFitRows if data.packing == "best_fit" else CorpusStream
    streams = [
        rows(
            Corpus.open(dataset.path, split, fingerprint=fingerprint, check_index=check_index),
            seq_len=seq_len,
            seed=data.seed,
            max_document_tokens=data.max_document_tokens,
            min_document_tokens=data.min_document_tokens,
            clusters=dataset.clusters,
        )
        for dataset in data.datasets
    ]
    weights = [dataset.weight for dataset in data.datasets]
    return Mixture(streams, weights, seed=data.seed, renormalize=data.renormalize_weights)


def step_rows(config: JobConfig, batch_ranks: int) -> int:
    """Rows of a global step: those of the file, or one micro-batch of every rank that reads rows of its own."""
    batch_size = config.training.global_batch_size
    return config.training.local_batch_size * batch_ranks if batch_size < 0 else batch_size


def last_step(mixture: Mixture, max_epochs: Sequence[float | None], rows_per_step: int, steps: int) -> int:
    """The last of `steps` steps that passes no corpus' `max_epochs`."""
    limit = mixture.rows_until(max_epochs)
    return steps if limit is None else min(steps, limit[0] // rows_per_step)


@dataclass(eq=False)
class _Rows(IterableDataset):
    """This rank's micro-batches from micro-batch `first` on; worker w of n makes every n-th of them."""

    mixture: Mixture
    batch_size: int
    rank: int
    num_ranks: int
    first: int
    hidden: HiddenStateReader | None

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        micro_batch = self.first + offset
        while True:
            start = (micro_batch * self.num_ranks + self.rank) * self.batch_size
            rows = batch(self.mixture, start, self.batch_size)
            labels = rows.pop("labels")
            if self.hidden is not None:
                rows["teacher_hidden"] = self.hidden.read(rows["corpus"].tolist(), rows["row"].tolist())
            yield rows, labels
            micro_batch += stride


class MixtureLoader(BaseDataLoader):
    """Endless micro-batches of one data-parallel rank; resumes at any sequence on any number of ranks.

    Attributes:
        mixture: what is read.
        hidden: where the teacher's hidden states are read from; None: nowhere. To be set before iteration begins.
        next_sequence: the first that no step has consumed.
    """

    hidden: HiddenStateReader | None = None

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        rank: int,
        num_ranks: int,
        *,
        rows_per_step: int | None = None,
        names: Sequence[str] = (),
        max_epochs: Sequence[float | None] = (),
        **worker_settings: Any,
    ):
        """
        Args:
            mixture: what to read.
            batch_size: rows of a micro-batch of this rank.
            rank, num_ranks: among those that read different rows.
            rows_per_step: of a global step; None without accumulation.
            names: of the corpora, for `consumed`.
            max_epochs: of each corpus; none without a limit.
            worker_settings: of torch's DataLoader.
        """
        self.mixture = mixture
        self._rows_per_step = rows_per_step or batch_size * num_ranks
        self._names, self._max_epochs = names or mixture.names, max_epochs
        self.next_sequence = 0
        self._batch_size, self._rank, self._num_ranks = batch_size, rank, num_ranks
        if not worker_settings.get("num_workers"):
            worker_settings = {k: v for k, v in worker_settings.items() if k == "pin_memory"}
        self._worker_settings = worker_settings

    def __iter__(self) -> Iterator[Row]:
        sequences = self._batch_size * self._num_ranks
        if self.next_sequence % sequences:
            raise ValueError(
                f"cannot resume at sequence {self.next_sequence:,} with {self._num_ranks} data-parallel ranks of "
                f"{self._batch_size} rows: choose training.local_batch_size so that ranks × rows divides it"
            )
        first = self.next_sequence // sequences
        rows = _Rows(self.mixture, self._batch_size, self._rank, self._num_ranks, first, self.hidden)
        for micro_batch in StatefulDataLoader(rows, batch_size=None, **self._worker_settings):
            self.next_sequence += sequences
            yield micro_batch

    def consumed(self) -> dict[str, float]:
        """What all ranks have read of each corpus since the beginning of the run, over restarts too.

        tokens/<name>: without padding; epochs/<name>: passes over the corpus.
        """
        counts, epochs = self.mixture.counts(self.next_sequence), self.mixture.epochs(self.next_sequence)
        found: dict[str, float] = {}
        per_rows = [stream.tokens_per_row for stream in self.mixture.streams]
        for name, rows, per_row, passes in zip(self._names, counts.tolist(), per_rows, epochs, strict=True):
            found |= {f"tokens/{name}": round(rows * per_row), f"epochs/{name}": round(float(passes), 6)}
        return found

    def last_step(self, steps: int) -> int:
        """The last of `steps` steps that passes no corpus' `max_epochs`."""
        return last_step(self.mixture, self._max_epochs, self._rows_per_step, steps)

    def state_dict(self) -> dict[str, Any]:
        """Index of the first sequence that no step has consumed, of what mixture, and rows of a global step."""
        return {
            "next_sequence": self.next_sequence,
            "rows_per_step": self._rows_per_step,
            "mixture": self.mixture.identity,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes `state_dict()` of any layout.

        Raises:
            ValueError: of another mixture, in which the same number means other rows, or of another global batch.
        """
        if state_dict["rows_per_step"] != self._rows_per_step:
            raise ValueError(
                f"the checkpoint's steps have {state_dict['rows_per_step']} rows, the configuration's "
                f"{self._rows_per_step}: restore training.global_batch_size, or start a new job.dump_folder with "
                "checkpoint.initial_load_path"
            )
        if state_dict["mixture"] != self.mixture.identity:
            raise ValueError(
                f"the checkpoint's data were {state_dict['mixture']}, the configuration's are {self.mixture.identity}: "
                "restore them, or start a new job.dump_folder with checkpoint.initial_load_path"
            )
        self.next_sequence = state_dict["next_sequence"]


def build_loader(dp_world_size: int, dp_rank: int, tokenizer: Tokenizer, job_config: JobConfig) -> MixtureLoader:
    """torchtitan's hook."""
    data, seq_len = job_config.data, job_config.training.seq_len
    mixture = open_mixture(data, "train", seq_len, tokenizer.fingerprint, check_index=False)
    settings = job_config.training.dataloader
    return MixtureLoader(
        mixture,
        job_config.training.local_batch_size,
        dp_rank,
        dp_world_size,
        rows_per_step=max(job_config.training.global_batch_size, 0) or None,
        names=[dataset.name for dataset in data.datasets],
        max_epochs=[dataset.max_epochs for dataset in data.datasets],
        num_workers=settings.num_workers,
        pin_memory=settings.pin_memory,
        persistent_workers=settings.persistent_workers,
        prefetch_factor=settings.prefetch_factor,
    )
