"""Processes that make the parts of corpora, each part in one of them from beginning to end.

Nothing passes between the processes but the tokenizer, the parts to make, and counts of bytes. After an error the parts
that are under way are still finished; what an unfinished part had written is removed.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from mobilellm_pro.data.corpus_parts import remove_part, write_part
from mobilellm_pro.data.dataset_config import DatasetConfig
from mobilellm_pro.data.megatron import adopt_part
from mobilellm_pro.data.source import Source
from mobilellm_pro.data.text_parts import tokenize_part
from mobilellm_pro.data.tokenizer import Tokenizer

_LOST_WORKER = (
    "a worker process died, most likely because memory ran out: run `prepare` again, with fewer `workers` "
    "if it happens again; finished parts are kept"
)


class PartJob(NamedTuple):
    """One part to make."""

    dataset: DatasetConfig
    folder: Path
    number: int
    sources: list[Source]


class PartMade(NamedTuple):
    """A part that was made: its bytes of text, and when the work on it began (`time.monotonic`, of all processes)."""

    text_bytes: int
    begun: float


class Progress:
    """Counts that all processes increase, and the parent's wish to stop."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.source_bytes, self.text_bytes = context.Value("q", 0), context.Value("q", 0)
        self.stop = context.Value("b", 0)

    def add(self, source_bytes: int, text_bytes: int) -> None:
        """Raises KeyboardInterrupt when the parent was interrupted."""
        if self.stop.value:
            raise KeyboardInterrupt
        for counter, count in ((self.source_bytes, source_bytes), (self.text_bytes, text_bytes)):
            with counter.get_lock():
                counter.value += count


def run_parts(
    jobs: list[PartJob],
    tokenizer: Tokenizer,
    workers: int | None,
    progress: Progress,
    done: Callable[[PartJob, PartMade], None],
) -> list[BaseException]:
    """Makes the parts; after the first error the running ones are finished and no other begins. Returns all errors."""
    errors: list[BaseException] = []
    if workers == 0 or not jobs:
        for job in jobs:
            done(job, _make_part(job, tokenizer, 1, progress))
        return errors
    cores = len(os.sched_getaffinity(0)) if workers is None else workers
    processes = min(cores, len(jobs))
    # A fresh interpreter per process: forking one that runs threads (progress bar, torch) can deadlock.
    context = multiprocessing.get_context("spawn")
    arguments = (tokenizer, max(cores // processes, 1), progress)
    waiting, running = deque(jobs), dict[Future[PartMade], PartJob]()
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=arguments) as pool:
        try:
            while running or (waiting and not errors):
                while waiting and not errors and len(running) < processes:
                    job = waiting.popleft()
                    running[pool.submit(_make_in_worker, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        done(job, future.result())
                    except Exception as error:
                        errors.append(error)
        except BaseException:
            progress.stop.value = 1
            raise
    return errors


def raise_all(errors: list[BaseException]) -> None:
    """Raises a bug before anything else, a single error as it is, several mistakes of the user as one."""
    if not errors:
        return
    for error in errors:
        if not isinstance(error, ValueError | OSError | BrokenProcessPool):
            raise error
    texts = [_LOST_WORKER if isinstance(error, BrokenProcessPool) else str(error) for error in errors]
    if len(errors) == 1 and not isinstance(errors[0], BrokenProcessPool):
        raise errors[0]
    raise ValueError("\n".join(dict.fromkeys(texts))) from errors[0]


_worker: tuple[Tokenizer, int, Progress] | None = None


def _start_worker(tokenizer: Tokenizer, threads: int, progress: Progress) -> None:
    """Sets up a worker process."""
    global _worker
    _worker = tokenizer, threads, progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    end_with_parent()


def end_with_parent() -> None:
    """Lets a worker process end with its parent: one that lived on would write what the next run makes again."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _make_in_worker(job: PartJob) -> PartMade:
    assert _worker is not None
    return _make_part(job, *_worker)


def _make_part(job: PartJob, tokenizer: Tokenizer, threads: int, progress: Progress) -> PartMade:
    """Makes one part and its record, or leaves nothing of it."""
    dataset, folder, number, sources = job
    begun = time.monotonic()
    remove_part(folder, number)
    try:
        if dataset.format == "megatron":
            record = adopt_part(dataset, sources, folder, number, tokenizer, progress=progress.add)
        else:
            record = tokenize_part(dataset, sources, folder, number, tokenizer, threads=threads, progress=progress.add)
        write_part(folder, number, record)
    except BaseException:
        remove_part(folder, number)
        raise
    return PartMade(sum(record.text_bytes.values()), begun)
