"""[teacher] cache in a job: which rows it writes or reads, whether they fit on the disk, and whether all are there.

`cache = "write"` keeps the teacher's hidden states of every row, held-out ones too, `cache = "read"` takes them from
there; `data/hidden_states` has the cache itself. All that can be wrong with it is found before a process group starts.
What was on disk when a checkpoint was taken belongs to that checkpoint: a run that goes on from it leaves no hole.

Reading costs a step nothing where `training.dataloader` has `num_workers` (one a rank reads 40,000 tokens a second and
more at Scout's width) and, on a GPU, `pin_memory`. The micro-batches of a step wait in host memory with their hidden
states; writing holds up to twice `teacher.cache_file_mib` a rank there.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.data.hidden_state_files import CacheKey, CorpusKey
from mobilellm_pro.data.hidden_state_folder import CACHE_FILE, check_cache, folder_problem
from mobilellm_pro.data.hidden_state_index import CorpusIndex, order_problems
from mobilellm_pro.data.hidden_states import HiddenStateReader, HiddenStateWriter
from mobilellm_pro.data.mixture import Mixture
from mobilellm_pro.model.checkpoint import architecture, latest_checkpoint
from mobilellm_pro.model.row_shard import RowShard, own_shard
from mobilellm_pro.model.tensor_files import fingerprint
from mobilellm_pro.training.disk_room import free_bytes, in_words
from mobilellm_pro.training.loader import MixtureLoader, last_step, open_mixture, step_rows

_fingerprint = lru_cache(maxsize=1)(fingerprint)  # preflight and the trainer ask for it


def cache_key(config: JobConfig) -> CacheKey:
    """The cache that belongs to the teacher of a job.

    Raises:
        ValueError, FileNotFoundError: no usable folder of a teacher.
    """
    teacher = config.teacher
    width = architecture(teacher.path).hidden_size
    return CacheKey(_fingerprint(teacher.path), teacher.quantization, teacher.dtype, width, teacher.cache_dtype)


def corpus_keys(config: JobConfig, mixture: Mixture) -> list[CorpusKey]:
    """What identifies the rows of each corpus of a mixture, in its order."""
    attention = config.attention
    return [
        CorpusKey(
            stream.corpus.split,
            stream.corpus.name,
            stream.corpus.content,
            stream.seq_len,
            config.data.seed,
            stream.options or config.data.packing,
            attention.teacher_mask,
            attention.positions,
        )
        for stream in mixture.streams
    ]


def rows_of_run(config: JobConfig, mixture: Mixture, batch_ranks: int, steps: int | None = None) -> list[int]:
    """Rows of each corpus, 0 up to these, that a job reads of a split.

    Args:
        config: of the job.
        mixture: of the split.
        batch_ranks: ranks that read different rows.
        steps: of training; default all of them. Validation reads the same rows every time.
    """
    if mixture.streams[0].corpus.split == "valid":
        return mixture.counts(config.validation.steps * config.validation.local_batch_size * batch_ranks).tolist()
    limits, rows = [dataset.max_epochs for dataset in config.data.datasets], step_rows(config, batch_ranks)
    wanted = config.training.steps if steps is None else min(steps, config.training.steps)
    return mixture.counts(last_step(mixture, limits, rows, wanted) * rows).tolist()


def cache_problems(config: JobConfig, batch_ranks: int) -> Iterator[str]:
    """Everything that keeps a job from writing or reading its cache, each with the cure.

    Raises:
        ValueError, FileNotFoundError: what makes it pointless to look further: no cache, another teacher, a damaged
            file.
    """
    mode, folder = config.teacher.cache, Path(config.teacher.cache_path)
    if mode == "off":
        return
    key = cache_key(config)
    if mode == "read" or (folder / CACHE_FILE).exists():
        check_cache(folder, key, config.teacher.path)
    mixtures = [
        open_mixture(config.data, split, seq_len, check_index=False) for split, seq_len in _splits(config).items()
    ]
    for mixture in mixtures:
        if mode == "read":
            yield from _holes(config, key, mixture, rows_of_run(config, mixture, batch_ranks))
        else:
            yield from _lost(config, key, mixture, batch_ranks)
    if mode == "write":
        problem = folder_problem(folder, [stream.corpus.name for stream in mixtures[0].streams])
        if problem:
            yield problem
            return
        needed = sum(size for size, _, _ in _sizes(config, key, mixtures, batch_ranks))
        free = free_bytes(folder)
        if needed > free:
            yield (
                f"teacher.cache_path = {str(folder)!r}: the hidden states that this run has to write take "
                f"{in_words(needed)}, {in_words(free)} are free on that disk: free space or choose another disk, "
                'set teacher.cache_dtype = "float8", or lower training.steps'
            )


def _splits(config: JobConfig) -> dict[str, int]:
    """Split -> tokens of a row."""
    valid = {"valid": config.validation.seq_len} if config.validation.enable else {}
    return {"train": config.training.seq_len, **valid}


def _holes(config: JobConfig, cache: CacheKey, mixture: Mixture, counts: Sequence[int]) -> Iterator[str]:
    """One problem for each corpus whose first so many rows are not all in the cache."""
    folder = Path(config.teacher.cache_path)
    for key, count in zip(corpus_keys(config, mixture), counts, strict=True):
        missing = CorpusIndex.open(folder, cache, key).missing_rows(count)
        if len(missing):
            yield order_problems(folder, key) or (
                f"{folder}: {len(missing):,} of the {count:,} rows of {key} that this run reads are not in the cache, "
                f'the first is row {missing[0]:,}: run the job with teacher.cache = "write" to its end, or read fewer '
                "rows"
            )


def _lost(config: JobConfig, cache: CacheKey, mixture: Mixture, batch_ranks: int) -> Iterator[str]:
    """Rows of steps that a resumed run will not do again, which nobody will write."""
    checkpoint = config.checkpoint
    own = latest_checkpoint(Path(config.job.dump_folder) / checkpoint.folder) if checkpoint.enable else None
    if own is None or mixture.streams[0].corpus.split == "valid":
        return
    step = checkpoint.load_step if checkpoint.load_step >= 0 else int(own.name.removeprefix("step-"))
    rows = rows_of_run(config, mixture, batch_ranks, step)
    for key, count in zip(corpus_keys(config, mixture), rows, strict=True):
        missing = CorpusIndex.open(Path(config.teacher.cache_path), cache, key).missing_rows(count)
        if len(missing):
            yield (
                f"teacher.cache_path = {config.teacher.cache_path!r}: the run goes on from step {step:,}, but "
                f"{len(missing):,} of the {count:,} rows of {key} before it are not in the cache, the first is row "
                f'{missing[0]:,}: start anew in another job.dump_folder, or set teacher.cache = "off"'
            )


def _sizes(
    config: JobConfig, cache: CacheKey, mixtures: Sequence[Mixture], batch_ranks: int
) -> list[tuple[int, int, CorpusKey]]:
    """(bytes that are to be written, bytes in all, corpus) of every corpus and split of a run."""
    sizes = []
    for mixture in mixtures:
        counts = rows_of_run(config, mixture, batch_ranks)
        for key, count in zip(corpus_keys(config, mixture), counts, strict=True):
            missing = CorpusIndex.open(Path(config.teacher.cache_path), cache, key).missing_rows(count)
            a_row = key.seq_len * cache.bytes_per_token
            sizes.append((len(missing) * a_row, count * a_row, key))
    return sizes


class CacheWriter:
    """The cache of a job with `cache = "write"`, on one rank."""

    def __init__(self, config: JobConfig, mixtures: Sequence[Mixture], parallel_dims: ParallelDims) -> None:
        """
        Args:
            config: of the job.
            mixtures: of training and, with validation, of validation.
            parallel_dims: of the student; of ranks with equal rows and tokens only the first writes.

        Raises:
            ValueError: the folder is the cache of another teacher, or damaged.
        """
        teacher = config.teacher
        self._config, self._mixtures = config, list(mixtures)
        self._batch_ranks = parallel_dims.dp_replicate * parallel_dims.dp_shard
        self._cache, self._first_rank = cache_key(config), dist.get_rank() == 0
        self._keys = {mixture.streams[0].corpus.split: corpus_keys(config, mixture) for mixture in mixtures}
        self._kept: set[str] = set()
        if self._first_rank:
            self._report_sizes()
        self._writer: HiddenStateWriter | None = None
        if not parallel_dims.tp_enabled or parallel_dims.get_mesh("tp").get_local_rank() == 0:
            self._writer = HiddenStateWriter(
                Path(teacher.cache_path),
                self._cache,
                [key for keys in self._keys.values() for key in keys],
                file_bytes=teacher.cache_file_mib * 2**20,
                teacher_path=teacher.path,
            )

    def keep(self, split: str, input_dict: dict[str, Tensor], hidden_BSD: Tensor, shard: RowShard) -> None:
        """Takes the hidden states of a micro-batch, of this rank's part of each row.

        Raises:
            ValueError: a file could not be written.
        """
        self._kept.add(split)
        if self._writer is not None:
            corpora = [self._keys[split][corpus] for corpus in input_dict["corpus"].tolist()]
            pieces = shard.pieces()
            lengths = [end - begin for begin, end in pieces]
            for (begin, _), hidden in zip(pieces, hidden_BSD.split(lengths, dim=1), strict=True):
                self._writer.add(corpora, input_dict["row"].tolist(), hidden, first=begin)

    def has_kept(self, split: str) -> bool:
        """Whether this process has run the teacher on rows of a split; the same on every rank."""
        return split in self._kept

    def flush(self) -> None:
        """Returns when everything kept so far is on disk."""
        if self._writer is not None:
            self._writer.flush()

    def finish(self) -> None:
        """Ends writing, on all ranks, and says whether all rows of the run are there."""
        if self._writer is not None:
            self._writer.close()
        dist.barrier()
        if not self._first_rank:
            return
        holes = [
            hole
            for mixture in self._mixtures
            for hole in _holes(
                self._config, self._cache, mixture, rows_of_run(self._config, mixture, self._batch_ranks)
            )
        ]
        for hole in holes:
            logger.warning(hole)
        if not holes:
            logger.info(f"{self._config.teacher.cache_path}: the hidden states of all rows of this run are there")

    def _report_sizes(self) -> None:
        sizes = _sizes(self._config, self._cache, self._mixtures, self._batch_ranks)
        for needed, whole, key in sizes:
            logger.info(f"hidden states of {key}: {in_words(whole)}, of which {in_words(needed)} to be written")
        needed, whole = (int(np.sum([size[i] for size in sizes])) for i in (0, 1))
        folder = Path(self._config.teacher.cache_path)
        free = free_bytes(folder)
        logger.info(
            f"hidden states of the run in {folder}: {in_words(whole)} at {self._cache.bytes_per_token:,} bytes a "
            f"token, of which {in_words(needed)} to be written; {in_words(free)} free"
        )


def attach_reader(config: JobConfig, loader: MixtureLoader, parallel_dims: ParallelDims) -> None:
    """Makes a loader bring the cached hidden states of this rank's part of its rows.

    Raises:
        ValueError: the cache is of another teacher, or a file in it is damaged.
    """
    key, folder = cache_key(config), Path(config.teacher.cache_path)
    check_cache(folder, key, config.teacher.path)
    indexes = [CorpusIndex.open(folder, key, corpus) for corpus in corpus_keys(config, loader.mixture)]
    shard = own_shard(loader.mixture.seq_len, parallel_dims, config.attention.context_layout)
    loader.hidden = HiddenStateReader(indexes, key, pieces=shard.pieces())
