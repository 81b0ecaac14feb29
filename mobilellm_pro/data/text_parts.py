"""One part of a corpus of text: sources -> documents -> ids -> shards, in one process from beginning to end.

Text goes through in pieces of bounded size (`Tokenizer.encode_pieces`): a document of hundreds of megabytes is never
there as ids in full, and several threads can work on it. Pieces come back in order, so the shards depend neither on the
number of threads nor on that of processes. Every document becomes bos + ids + eos.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mobilellm_pro.data.corpus_parts import PartRecord, split_of, splits_of
from mobilellm_pro.data.dataset_config import DatasetConfig
from mobilellm_pro.data.documents import read_documents, text_hash
from mobilellm_pro.data.shard_writer import ShardWriter
from mobilellm_pro.data.source import Document, Source
from mobilellm_pro.data.source_records import source_mtime, source_record
from mobilellm_pro.data.tokenizer import Tokenizer

_BATCH_CHARS = 250_000  # text for one call of a thread: some 30 ms, which hides the cost of calling
ReportProgress = Callable[[int, int], None]
"""Called with the source bytes and the text bytes behind what has been written since the last call."""


class _Piece(NamedTuple):
    """Text of one document, or a part of it, with its place in the document."""

    text: str
    document_id: str
    split: str
    first: bool
    last: bool


class _Batch(NamedTuple):
    """Pieces in order, and the source bytes that have been read for them."""

    pieces: list[_Piece]
    source_bytes: int


def tokenize_part(
    dataset: DatasetConfig, sources: list[Source], folder: Path, number: int, tokenizer: Tokenizer, *,
    threads: int, progress: ReportProgress,
) -> PartRecord:  # fmt: skip
    """Makes the shards of a part; its record is the caller's to write.

    Args:
        dataset: format, filters, holdout, dev, bos and eos.
        sources: of this part.
        folder: of the corpus.
        number: of the part.
        tokenizer: makes the ids.
        threads: that encode; with 1 the encoding happens in this one.
        progress: hears of every batch.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a mistake in the text (`read_documents`), or a full disk.
    """
    mtimes = [source_mtime(source) for source in sources]
    bos = np.array([tokenizer.bos_id] if dataset.bos else [], dtype=np.int32)
    eos = np.array([tokenizer.eos_id] if dataset.eos else [], dtype=np.int32)
    splits = splits_of(dataset.settings())
    text_bytes, skipped = dict.fromkeys(splits, 0), Counter[str]()

    def encode(batch: _Batch) -> list[np.ndarray]:
        return [tokenizer.encode_piece(piece.text) for piece in batch.pieces]

    options = {"shard_tokens": dataset.shard_tokens, "part": number}
    with ExitStack() as open_writers:
        writers = {split: open_writers.enter_context(ShardWriter(folder, split, **options)) for split in splits}
        batches = _batches(dataset, sources, tokenizer, skipped)
        for batch, encoded in _in_order(encode, batches, threads):
            sizes = dict.fromkeys(splits, 0)
            for piece, ids in zip(batch.pieces, encoded, strict=True):
                _write(writers[piece.split], piece, ids, bos, eos)
                sizes[piece.split] += _utf8_bytes(piece.text)
            for split, size in sizes.items():
                text_bytes[split] += size
            progress(batch.source_bytes, sum(sizes.values()))
    records = [source_record(source, mtime) for source, mtime in zip(sources, mtimes, strict=True)]
    return PartRecord({split: writer.records for split, writer in writers.items()}, records, text_bytes, dict(skipped))


def _write(writer: ShardWriter, piece: _Piece, ids: np.ndarray, bos: np.ndarray, eos: np.ndarray) -> None:
    if piece.first and len(bos):
        writer.append(bos)
    writer.append(ids)
    if piece.last:
        if len(eos):
            writer.append(eos)
        writer.end_document(piece.document_id)


def _batches(
    dataset: DatasetConfig, sources: list[Source], tokenizer: Tokenizer, skipped: Counter[str]
) -> Iterator[_Batch]:
    """Pieces of all documents, about _BATCH_CHARS characters at a time; counts what is left out in `skipped`."""
    pieces: list[_Piece] = []
    chars, read = 0, 0  # of this batch: characters in it, source bytes behind it
    for source in sources:
        position = 0
        for document in read_documents(dataset, source):
            reason = dataset.rejects(document)
            if reason:
                skipped[reason] += 1
            else:
                for piece in _pieces(document, dataset, tokenizer):
                    pieces.append(piece)
                    chars += len(piece.text)
                    if chars >= _BATCH_CHARS:
                        yield _Batch(pieces, read)
                        pieces, chars, read = [], 0, 0
            read += max(document.position - position, 0)
            position = max(document.position, position)
            del document  # or a large one would still be there while the next one is read
        read += max((source.num_bytes or 0) - position, 0)
    yield _Batch(pieces, read)


def _pieces(document: Document, dataset: DatasetConfig, tokenizer: Tokenizer) -> Iterator[_Piece]:
    # By text: copies under several ids stay on one side.
    split = split_of(text_hash(document.text), dataset.holdout, dataset.dev)
    texts = tokenizer.encode_pieces(document.text)
    text, first = next(texts, ""), True
    for following in texts:
        yield _Piece(text, document.id, split, first, False)
        text, first = following, False
    yield _Piece(text, document.id, split, first, True)


def _in_order(
    encode: Callable[[_Batch], list[np.ndarray]], batches: Iterator[_Batch], threads: int
) -> Iterator[tuple[_Batch, list[np.ndarray]]]:
    """Each batch with its ids, in order; a bounded number of them is in memory at any time."""
    if threads == 1:  # nothing to gain from handing over: reading and writing take a few percent of the time
        for batch in batches:
            yield batch, encode(batch)
        return
    running: deque[tuple[_Batch, Future[list[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            running.append((batch, pool.submit(encode, batch)))
            if len(running) > 2 * threads:
                done, future = running.popleft()
                yield done, future.result()
        while running:
            done, future = running.popleft()
            yield done, future.result()


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
