"""Adopts corpora that Megatron-LM, NeMo or datatrove tokenized: format = "megatron", `source` = their `.idx` files.

The ids stay where they are. They are read to find ids outside the vocabulary, to count the text behind them and to hold
documents out; what is written are new indexes, each beside a link to the original `.bin`. In their format
(`shard_index` has the layout) a document may be several sequences, which are joined here, and an index of text with
pictures ends with a type for each sequence, int8, 0 for text.

As its text does elsewhere, a document's tokens decide on which side of the held-out split it falls.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobilellm_pro.data.corpus_parts import SPLITS, PartRecord, split_of_digest, splits_of
from mobilellm_pro.data.dataset_config import DatasetConfig
from mobilellm_pro.data.manifest import ShardRecord, file_sha256
from mobilellm_pro.data.shard_index import (
    DTYPE_OF_CODE,
    HEADER,
    MAX_DOCUMENT_TOKENS,
    map_array,
    unpack_header,
    write_index,
)
from mobilellm_pro.data.shard_writer import flush_to_disk, full_disk_named
from mobilellm_pro.data.source import Source
from mobilellm_pro.data.source_records import source_mtime, source_record
from mobilellm_pro.data.text_parts import ReportProgress
from mobilellm_pro.data.tokenizer import Tokenizer

_BLOCK_TOKENS = 2**22
_OTHER_TYPES = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "float64", 7: "float32"}
_COPY = "copy the .idx and .bin again, or make them again with the program that wrote them"


@dataclass(frozen=True)
class MegatronIndex:
    """Where the documents of a `.bin` lie.

    Attributes:
        path: of the `.idx`.
        dtype: of the ids.
        starts: int64 [documents], token of the `.bin` at which each begins.
        lengths: int64 [documents], tokens of each.
    """

    path: Path
    dtype: np.dtype
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def binary(self) -> Path:
        """The file of the ids."""
        return self.path.with_suffix(".bin")


@dataclass(frozen=True)
class _Scan:
    """What reading the ids has shown: number of the split and bytes of text, per document; the largest id of all."""

    split: np.ndarray
    text_bytes: np.ndarray
    max_id: int


def adopt_part(
    dataset: DatasetConfig, sources: list[Source], folder: Path, number: int, tokenizer: Tokenizer, *,
    progress: ReportProgress,
) -> PartRecord:  # fmt: skip
    """Writes the indexes of a part; its record is the caller's to write.

    Args:
        dataset: gives the shares that are held out.
        sources: `.idx` files.
        folder: of the corpus.
        number: of the part.
        tokenizer: that made the ids.
        progress: hears of every source.

    Raises:
        FileNotFoundError: an `.idx` or its `.bin` does not exist.
        ValueError: a damaged index, ids of another type, an id outside the vocabulary, or a full disk.
    """
    splits = splits_of(dataset.settings())
    shards: dict[str, list[ShardRecord]] = {split: [] for split in splits}
    text_bytes, empty, records = dict.fromkeys(splits, 0), 0, []
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        assert source.path is not None
        mtime = source_mtime(source)
        index = read_megatron_index(source.path)
        scan = _scan(index, tokenizer, dataset)
        digest = file_sha256(index.binary)
        empty += int(np.count_nonzero(index.lengths == 0))
        for split in splits:
            chosen = (index.lengths > 0) & (scan.split == SPLITS.index(split))
            text_bytes[split] += int(scan.text_bytes[chosen].sum())
            if chosen.any():
                name = f"{split}-{number:05d}-{len(shards[split]):03d}"
                shards[split].append(_write_shard(folder / name, index, chosen, scan.max_id, digest))
        records.append(source_record(source, mtime, {index.binary: digest}))
        progress(source.num_bytes or 0, int(scan.text_bytes.sum()))
    return PartRecord(shards, records, text_bytes, {"empty": empty} if empty else {})


def read_megatron_index(path: Path) -> MegatronIndex:
    """Reads and checks an index of any writer of the format.

    Args:
        path: the `.idx`; its `.bin` must lie beside it.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: wrong magic or version; ids that are neither int32 nor uint16; an index of another size than it
            says; a sequence outside the `.bin`, or that does not follow the one before in its document, or that is not
            text.
    """
    for file in (path, path.with_suffix(".bin")):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, expected an .idx and its .bin: {_COPY}")
    code, sequences, borders = unpack_header(path, _COPY)
    if code not in DTYPE_OF_CODE:
        name = _OTHER_TYPES.get(code, "an unknown type")
        raise ValueError(f"{path}: ids are {name} (code {code}), expected int32 or uint16: tokenize again as int32")
    size, expected = path.stat().st_size, HEADER.size + 12 * sequences + 8 * borders
    if size not in (expected, expected + sequences):
        raise ValueError(
            f"{path}: {size} bytes, expected {expected} for {sequences} sequences ({expected + sequences} with types): "
            f"{_COPY}"
        )
    lengths = map_array(path, np.dtype("<i4"), HEADER.size, sequences)
    pointers = map_array(path, np.dtype("<i8"), HEADER.size + 4 * sequences, sequences)
    first = map_array(path, np.dtype("<i8"), HEADER.size + 12 * sequences, borders)
    if borders < 1 or first[0] != 0 or first[-1] != sequences or np.any(np.diff(first) < 0):
        raise ValueError(f"{path}: document borders do not run from 0 to {sequences}: {_COPY}")
    if size > expected:
        _check_text_only(path, map_array(path, np.dtype("i1"), expected, sequences), first)
    return _join(path, DTYPE_OF_CODE[code], lengths, pointers, first)


def _check_text_only(path: Path, modes: np.ndarray, first: np.ndarray) -> None:
    if modes.any():
        sequence = int((modes != 0).argmax())
        raise ValueError(
            f"{path}: document {_document_of(sequence, first)}, sequence {sequence} is of type {modes[sequence]}, "
            "expected 0 (text): remove what is not text"
        )


def _join(path: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray, first: np.ndarray) -> MegatronIndex:
    """Sequences to documents.

    Args:
        path: of the index, for messages.
        dtype: of the ids.
        lengths, pointers: int32 and int64 [sequences], tokens and first byte of each.
        first: int64 [documents + 1], first sequence of each document.
    """
    binary = path.with_suffix(".bin")
    size, ends = binary.stat().st_size, pointers + lengths.astype(np.int64) * dtype.itemsize
    wrong = (lengths < 0) | (pointers < 0) | (pointers % dtype.itemsize != 0) | (pointers > size) | (ends > size)
    if wrong.any():
        sequence = int(wrong.argmax())
        raise ValueError(
            f"{path}: document {_document_of(sequence, first)}, sequence {sequence} lies at bytes {pointers[sequence]} "
            f"to {ends[sequence]}, outside {binary.name} ({size} bytes) or not at an id: {_COPY}"
        )
    begins = np.zeros(len(lengths) + 1, dtype=bool)
    begins[first] = True
    apart = ~begins[1:-1] & (pointers[1:] != ends[:-1])
    if apart.any():
        sequence = int(apart.argmax()) + 1
        raise ValueError(
            f"{path}: document {_document_of(sequence, first)}, sequence {sequence} begins at byte "
            f"{pointers[sequence]}, not where the one before it ends ({ends[sequence - 1]}): {_COPY}"
        )
    sums = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    totals = np.diff(sums[first])
    if totals.max(initial=0) > MAX_DOCUMENT_TOKENS:
        raise ValueError(
            f"{path}: document {int(totals.argmax())} has {totals.max()} tokens, more than {MAX_DOCUMENT_TOKENS}: "
            "split it"
        )
    starts = np.append(pointers // dtype.itemsize, 0)[first[:-1]]  # an empty document may come after all sequences
    return MegatronIndex(path, dtype, starts, totals)


def _document_of(sequence: int, first: np.ndarray) -> int:
    return int(np.searchsorted(first, sequence, side="right")) - 1


def _scan(index: MegatronIndex, tokenizer: Tokenizer, dataset: DatasetConfig) -> _Scan:
    """Reads all documents, in blocks of at most _BLOCK_TOKENS."""
    ids = map_array(index.binary, index.dtype)
    split = np.zeros(len(index.lengths), dtype=np.int8)
    text_bytes, max_id = np.zeros(len(index.lengths), dtype=np.int64), -1
    for documents in _groups(index):
        begin, end = int(index.starts[documents[0]]), int(index.starts[documents[-1]] + index.lengths[documents[-1]])
        offsets, alone = index.starts[documents] - begin, hashlib.blake2b(digest_size=8)
        for start in range(begin, end, _BLOCK_TOKENS):  # more than one block only for a document that comes alone
            block = ids[start : min(start + _BLOCK_TOKENS, end)].astype("<i4")
            _check_ids(block, start, documents, index, tokenizer)
            max_id = max(max_id, int(block.max()))
            text_bytes[documents] += np.add.reduceat(tokenizer.token_bytes[block], offsets, dtype=np.int64)
            if len(documents) == 1:
                alone.update(block.data)
            else:
                digests = [hashlib.blake2b(part.data, digest_size=8) for part in np.split(block, offsets[1:])]
        if len(documents) == 1:
            digests = [alone]
        names = (split_of_digest(digest.digest(), dataset.holdout, dataset.dev) for digest in digests)
        split[documents] = [SPLITS.index(name) for name in names]
    return _Scan(split, text_bytes, max_id)


def _groups(index: MegatronIndex) -> Iterator[np.ndarray]:
    """Numbers of documents that lie one after another, together at most _BLOCK_TOKENS; a longer one comes alone."""
    documents = np.flatnonzero(index.lengths)
    starts, ends = index.starts[documents], index.starts[documents] + index.lengths[documents]
    breaks = np.append(np.flatnonzero(starts[1:] != ends[:-1]) + 1, len(documents))
    position = 0
    while position < len(documents):
        run = int(breaks[np.searchsorted(breaks, position, side="right")])
        fitting = position + int(np.searchsorted(ends[position:run], starts[position] + _BLOCK_TOKENS, side="right"))
        stop = max(fitting, position + 1)
        yield documents[position:stop]
        position = stop


def _check_ids(
    block: np.ndarray, start: int, documents: np.ndarray, index: MegatronIndex, tokenizer: Tokenizer
) -> None:
    """Raises ValueError for an id of a block, at token `start` of the file, that is not in the vocabulary."""
    wrong = (block < 0) | (block >= tokenizer.vocab_size)
    if wrong.any():
        place = start + int(wrong.argmax())
        document = documents[np.searchsorted(index.starts[documents], place, side="right") - 1]
        raise ValueError(
            f"{index.binary}: document {document} holds id {block[place - start]} at its token "
            f"{place - index.starts[document]}, but {tokenizer.source} has {tokenizer.vocab_size} ids: "
            "set `tokenizer` to the one that made the corpus"
        )


def _write_shard(stem: Path, index: MegatronIndex, chosen: np.ndarray, max_id: int, bin_sha256: str) -> ShardRecord:
    """The index of the chosen documents (bool [documents]), and a link to their `.bin`."""
    temporary, link = stem.with_name(f"{stem.name}.idx.tmp"), stem.with_name(f"{stem.name}.bin")
    lengths = index.lengths[chosen].astype(np.int32)
    with full_disk_named(temporary):
        write_index(temporary, lengths, starts=index.starts[chosen], dtype=index.dtype)
        with temporary.open("rb+") as file:
            flush_to_disk(file)
        link.symlink_to(index.binary.absolute())
        os.replace(temporary, temporary.with_suffix(""))
    tokens = int(lengths.sum(dtype=np.int64))
    digest = file_sha256(temporary.with_suffix(""))
    return ShardRecord(stem.name, len(lengths), tokens, max_id, bin_sha256, digest)
