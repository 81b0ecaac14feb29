"""Raw corpora to token shards: the `prepare` verb.

A corpus is made in parts (`corpus_parts`), each of them by one process from beginning to end: `text_parts` tokenizes
text, `megatron` adopts shards that others made. The parts of all corpora share one pool of processes, nothing passes
between them but counts, and the result does not depend on their number. A part counts from the moment its record is
there, so a killed run continues where it was. Neither the order of the input nor a new file in it moves a document
between "train", "valid" and "dev".

    mobilellm-pro prepare train_configs/debug/datasets.toml --cluster
    mobilellm-pro inspect outputs/debug/tokens
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mobilellm_pro.data.clustering import cluster_corpora, cluster_problems
from mobilellm_pro.data.corpus_parts import (
    PART_BYTES,
    Plan,
    changes,
    finish_corpus,
    make_plan,
    only_one,
    read_plan,
    remove_plan,
    write_plan,
)
from mobilellm_pro.data.dataset_config import DatasetConfig, load_datasets_config
from mobilellm_pro.data.manifest import FILE as MANIFEST
from mobilellm_pro.data.manifest import Manifest, read_manifest
from mobilellm_pro.data.part_workers import PartJob, PartMade, Progress, raise_all, run_parts
from mobilellm_pro.data.source_records import corpus_sources
from mobilellm_pro.data.tokenizer import Tokenizer

_REFRESH_SECONDS = 0.5


@dataclass
class _Corpus:
    """A corpus that is being made.

    Attributes:
        dataset, folder, plan: what is made, where, and of what.
        missing: numbers of the parts that are still to be made.
        text_bytes: of the parts that this run has made.
        begun: when the first of them began (`time.monotonic`).
    """

    dataset: DatasetConfig
    folder: Path
    plan: Plan
    missing: set[int]
    text_bytes: int = 0
    begun: float = math.inf


def prepare(
    datasets_toml: str | Path, *, overwrite: bool = False, workers: int | None = None, cluster: bool = False
) -> None:
    """Makes the token shards of every dataset of a `datasets.toml`; what is finished is skipped.

    Args:
        datasets_toml: the TOML file, see `dataset_config`.
        overwrite: make corpora afresh whose settings, tokenizer or sources have changed, instead of refusing.
        workers: cores to use, for processes and the threads in them; None takes all, 0 works in this process.
        cluster: then also sort the documents into as many clusters as a dataset says, for jobs that read some of them
            only; a page beside each corpus describes its clusters.

    Raises:
        FileNotFoundError: the TOML, the tokenizer or a source does not exist.
        ValueError: a mistake in the TOML or in the text, a full disk, or a corpus made, begun or clustered with other
            settings.
    """
    config = load_datasets_config(datasets_toml)
    if cluster and (found_problems := cluster_problems(config)):
        raise ValueError("\n".join(f"{datasets_toml}: {problem}" for problem in found_problems))
    tokenizer = Tokenizer.load(config.tokenizer)
    if workers is not None and workers < 0:
        raise ValueError(f"workers = {workers}: expected at least 0")
    found = [(dataset, config.output / dataset.name) for dataset in config.datasets]
    with ExitStack() as locks:
        for _, folder in found:  # before looking at what is there: it must not change meanwhile
            locks.enter_context(only_one(folder))
        made = [_made_so_far(dataset, folder, tokenizer, overwrite) for dataset, folder in found]
        waiting = [(*pair, plan) for pair, plan in zip(found, made, strict=True) if not isinstance(plan, Manifest)]
        for dataset, _, plan in waiting:  # before hours of work on the first one
            if plan is None and (unmatched := dataset.unmatched()):
                raise FileNotFoundError(f"{datasets_toml}: dataset {dataset.name!r}: no file matches {unmatched}")
        _make_corpora([_begin(*item, tokenizer) for item in waiting], tokenizer, workers)
        if cluster:
            cluster_corpora(config, tokenizer, overwrite=overwrite, workers=workers)


def _made_so_far(dataset: DatasetConfig, folder: Path, tokenizer: Tokenizer, overwrite: bool) -> Manifest | Plan | None:
    """The manifest of a finished corpus, the plan of an unfinished one, None where a new one is to be made.

    Raises:
        ValueError: what is there is not what the configuration says, and must not be overwritten.
    """
    try:
        made = read_manifest(folder) if (folder / MANIFEST).exists() else read_plan(folder)
        changed = changes(made, folder, dataset, tokenizer) if made else []
        if changed:
            raise ValueError(
                f"{folder} was prepared differently: {'; '.join(changed)}. Delete the folder, set overwrite, or choose "
                "another `output`"
            )
    except ValueError:
        if not overwrite:
            raise
        return None
    if isinstance(made, Manifest):
        remove_plan(folder)  # a kill may have come between the manifest and this
        print(f"{dataset.name:<13} already prepared: {made.split_sizes()}")
    return made


def _begin(dataset: DatasetConfig, folder: Path, plan: Plan | None, tokenizer: Tokenizer) -> _Corpus:
    """Writes the plan of a new corpus, or finds out what the old one lacks."""
    if plan is None:
        plan = make_plan(dataset, tokenizer)
        write_plan(folder, plan)
    else:
        plan = plan.with_sizes(corpus_sources(dataset))
    return _Corpus(dataset, folder, plan, set(plan.missing_parts(folder)))


def _make_corpora(corpora: list[_Corpus], tokenizer: Tokenizer, workers: int | None) -> None:
    """Makes all missing parts, and each manifest as soon as its parts are there."""
    by_folder = {corpus.folder: corpus for corpus in corpora}
    jobs = [
        PartJob(corpus.dataset, corpus.folder, number, corpus.plan.sources(number))
        for corpus in corpora
        for number in sorted(corpus.missing)
    ]
    # Huge files first, largest before all: one that begins last would keep a single process busy when the others rest.
    sizes = {(job.folder, job.number): by_folder[job.folder].plan.num_bytes(job.number) for job in jobs}
    jobs.sort(key=lambda job: -max(sizes[job.folder, job.number], 2 * PART_BYTES))
    progress = Progress()

    def done(job: PartJob, made: PartMade) -> None:
        corpus = by_folder[job.folder]
        corpus.missing.discard(job.number)
        corpus.text_bytes += made.text_bytes
        corpus.begun = min(corpus.begun, made.begun)
        if not corpus.missing:
            _finish(corpus)

    with _bar(sum(sizes.values()), progress):
        for corpus in corpora:
            if not corpus.missing:
                _finish(corpus)
        errors = run_parts(jobs, tokenizer, workers, progress, done)
    raise_all(errors)


def _finish(corpus: _Corpus) -> None:
    manifest = finish_corpus(corpus.folder, corpus.plan)
    megabytes, seconds = corpus.text_bytes / 1e6, max(time.monotonic() - corpus.begun, 0.0)
    tqdm.write(
        f"{corpus.dataset.name:<13} {manifest.split_sizes()}, {manifest.skipped_counts()}, "
        f"{sum(map(manifest.tokens, manifest.shards))} tokens, {megabytes:.1f} MB in {seconds:.1f} s "
        f"({megabytes / max(seconds, 1e-9):.1f} MB/s)"
    )


@contextmanager
def _bar(total: int, progress: Progress) -> Iterator[None]:
    """Shows the bytes of all sources, the speed in text, and the remaining time; nothing where no terminal is."""
    begun, stop = time.monotonic(), threading.Event()
    with tqdm(total=total or None, unit="B", unit_scale=True, disable=None) as bar:

        def refresh() -> None:
            speed = progress.text_bytes.value / 1e6 / (time.monotonic() - begun)
            bar.set_postfix_str(f"text {speed:.1f} MB/s", refresh=False)
            bar.update(progress.source_bytes.value - bar.n)

        def refresh_until_stopped() -> None:
            while not stop.wait(_REFRESH_SECONDS):
                refresh()

        thread = threading.Thread(target=refresh_until_stopped, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if not bar.disable:
                thread.join()
                refresh()
