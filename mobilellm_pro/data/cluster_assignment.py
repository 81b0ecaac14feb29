"""The nearest center of every document, by as many processes as there are cores.

A document's center does not depend on what is computed beside it, so neither do the numbers on the processes. Encoders
run in this process only: they have the accelerator, or torch's threads.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilellm_pro.data.cluster_features import Features, document_text
from mobilellm_pro.data.clusters import label_type
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer

_LEAST_DOCUMENTS = 50_000  # below, starting processes takes longer than the work
_Range = tuple[str, int, int]


@dataclass(frozen=True)
class Assigner:
    """All that is needed to number documents, for this process or another one.

    Attributes:
        model: a fitted scikit-learn k-means.
        corpora: split -> its documents.
        features: make points of texts.
        document_tokens: of a document that are looked at.
        tokenizer: of the corpora.
    """

    model: Any
    corpora: dict[str, Corpus]
    features: Features
    document_tokens: int
    tokenizer: Tokenizer

    def labels(self, split: str, first: int, last: int) -> np.ndarray:
        """int32 [last - first]: number of the nearest center of the documents first .. last - 1."""
        corpus, most = self.corpora[split], self.document_tokens
        texts = [document_text(corpus, document, most, self.tokenizer) for document in range(first, last)]
        return self.model.predict(self.features.points(texts))


def assign(
    assigner: Assigner, batch_documents: int, workers: int | None, progress: Callable[[int], Any]
) -> dict[str, np.ndarray]:
    """Numbers every document.

    Args:
        assigner: how.
        batch_documents: documents at a time.
        workers: processes; None: one a core; 0: this one.
        progress: hears how many documents are done.

    Returns:
        split -> [documents], of the type `label_type`.

    Raises:
        ValueError: a process died.
    """
    sizes = {split: corpus.num_documents for split, corpus in assigner.corpora.items()}
    labels = {split: np.empty(size, label_type(assigner.model.n_clusters)) for split, size in sizes.items()}
    ranges = [
        (split, first, min(first + batch_documents, size))
        for split, size in sizes.items()
        for first in range(0, size, batch_documents)
    ]
    cores = len(os.sched_getaffinity(0)) if workers is None else workers
    alone = cores < 2 or not assigner.features.in_processes or sum(sizes.values()) < _LEAST_DOCUMENTS
    for (split, first, last), found in _found_here(assigner, ranges) if alone else _found(assigner, ranges, cores):
        labels[split][first:last] = found
        progress(last - first)
    return labels


def _found_here(assigner: Assigner, ranges: list[_Range]) -> Iterator[tuple[_Range, np.ndarray]]:
    for item in ranges:
        yield item, assigner.labels(*item)


def _found(assigner: Assigner, ranges: list[_Range], processes: int) -> Iterator[tuple[_Range, np.ndarray]]:
    """Each range with its numbers, in order; a few a process are under way at any time."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads can deadlock
    running: list[tuple[_Range, Future[np.ndarray]]] = []
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(assigner,)) as pool:
        try:
            for item in ranges:
                running.append((item, pool.submit(_in_worker, *item)))
                if len(running) > 4 * processes:
                    done, future = running.pop(0)
                    yield done, future.result()
            for done, future in running:
                yield done, future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process that clusters documents died, most likely because memory ran out: run `prepare --cluster` "
                "again, with fewer `workers` if it happens again"
            ) from None


_assigner: Assigner | None = None


def _start_worker(assigner: Assigner) -> None:
    """Sets up a worker process: one thread each, as there is one of them a core."""
    from threadpoolctl import threadpool_limits

    global _assigner
    _assigner = assigner
    threadpool_limits(1)


def _in_worker(split: str, first: int, last: int) -> np.ndarray:
    assert _assigner is not None
    return _assigner.labels(split, first, last)
