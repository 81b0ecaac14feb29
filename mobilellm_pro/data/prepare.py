"""Text to token shards: the `prepare` and `inspect` verbs.

The parent process reads and writes, workers tokenize; results come back in order, so shards do not depend on the number
of workers. Every document becomes bos + tokens + eos, and goes to "train" or "valid" by a hash of its id: neither the
order of the input nor a new file in it moves a document from one side to the other.

    mobilellm-pro prepare train_configs/debug/datasets.toml
    mobilellm-pro inspect outputs/debug/tokens
"""

import hashlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mobilellm_pro.data.dataset_config import DatasetConfig, load_datasets_config
from mobilellm_pro.data.documents import Document, read_documents
from mobilellm_pro.data.manifest import FILE as MANIFEST
from mobilellm_pro.data.manifest import Manifest, file_sha256, read_manifest, write_manifest
from mobilellm_pro.data.shard_writer import ShardWriter
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer

SPLITS = ("train", "valid")
_BATCH_CHARS = 1_000_000  # text per message to a worker: large enough to hide the cost of sending it


class _Encoded(NamedTuple):
    """Documents after tokenization: names, sizes in bytes of text, and one id array each."""

    names: list[str]
    sizes: list[int]
    ids: list[np.ndarray]


def prepare(datasets_toml: str | Path, *, overwrite: bool = False, workers: int | None = None) -> None:
    """Makes the token shards of every dataset of a `datasets.toml`; finished ones are skipped.

    Args:
        datasets_toml: the TOML file, see `dataset_config`.
        overwrite: make corpora again whose settings or tokenizer have changed, instead of refusing.
        workers: tokenizing processes; None takes one per core, 0 works in this process.

    Raises:
        FileNotFoundError: the TOML, the tokenizer or a source does not exist.
        ValueError: a mistake in the TOML or in the text, or a finished corpus made with other settings.
    """
    config = load_datasets_config(datasets_toml)
    tokenizer = Tokenizer.load(config.tokenizer)
    waiting = [dataset for dataset in config.datasets if not _finished(dataset, config.output, tokenizer, overwrite)]
    for dataset in waiting:  # before hours of work on the first one
        if not dataset.files():
            raise FileNotFoundError(
                f"{datasets_toml}: dataset {dataset.name!r}: no file matches {list(dataset.source)}"
            )
    for dataset in waiting:
        _prepare_dataset(dataset, config.output / dataset.name, tokenizer, workers)


def _finished(dataset: DatasetConfig, output: Path, tokenizer: Tokenizer, overwrite: bool) -> bool:
    """True when the corpus is there and as configured; raises ValueError when it is something else."""
    folder = output / dataset.name
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_manifest(folder)
    settings = dataset.settings()
    old = {**manifest.settings, "tokenizer": manifest.fingerprint[:12]}
    new = {**settings, "tokenizer": tokenizer.fingerprint[:12]}
    changed = [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in new if old.get(key) != new.get(key)]
    sizes = {str(record["path"]): record["bytes"] for record in manifest.sources}
    files = {str(file): file.stat().st_size for file in _plain_files(dataset)}
    if files and files != sizes:  # raw text may be deleted once it is prepared
        changed.append(f"source files changed: {sorted(set(files.items()) ^ set(sizes.items()))[0][0]}")
    if changed and not overwrite:
        raise ValueError(
            f"{folder} was prepared differently: {'; '.join(changed)}. Delete the folder, set overwrite, or choose "
            "another `output`"
        )
    if not changed:
        print(f"{dataset.name:<13} already prepared: {manifest.split_sizes()}")
    return not changed


def _prepare_dataset(dataset: DatasetConfig, folder: Path, tokenizer: Tokenizer, workers: int | None) -> None:
    """Reads, tokenizes and writes one corpus; the manifest comes last and makes it valid."""
    _remove_old(folder)
    started = time.monotonic()
    documents = read_documents(
        dataset.format, dataset.files(), text_column=dataset.text_column, id_column=dataset.id_column
    )
    text_bytes, skipped = dict.fromkeys(SPLITS, 0), [0]
    options = {"shard_tokens": dataset.shard_tokens}
    with ShardWriter(folder, "train", **options) as train, ShardWriter(folder, "valid", **options) as valid:
        writers = {"train": train, "valid": valid}
        batches = _batches(documents, dataset.min_chars, skipped)
        with tqdm(desc=dataset.name, unit="B", unit_scale=True, disable=None) as bar:
            for encoded in _encode_all(batches, tokenizer, dataset, workers):
                for name, size, ids in zip(*encoded, strict=True):
                    split = split_of(name, dataset.holdout)
                    writers[split].add(ids, name)
                    text_bytes[split] += size
                bar.update(sum(encoded.sizes))
    shards = {split: writer.records for split, writer in writers.items()}
    sources = [
        {"path": str(file), "bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in _plain_files(dataset)
    ]
    manifest = Manifest(
        tokenizer.source, tokenizer.fingerprint, tokenizer.vocab_size, dataset.settings(), sources, shards, text_bytes,
        skipped[0],
    )  # fmt: skip
    if not any(shards.values()):
        raise ValueError(f"dataset {dataset.name!r}: no documents in {list(dataset.source)} ({skipped[0]} too short)")
    write_manifest(folder, manifest)
    total, seconds = sum(text_bytes.values()) / 1e6, time.monotonic() - started
    print(
        f"{dataset.name:<13} {manifest.split_sizes()}, {skipped[0]} skipped, "
        f"{manifest.tokens('train') + manifest.tokens('valid')} tokens, {total:.1f} MB in {seconds:.1f} s "
        f"({total / max(seconds, 1e-9):.1f} MB/s)"
    )


def split_of(document_id: str, holdout: float) -> str:
    """ "valid" for a share `holdout` of all ids, else "train"; a function of the id alone."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "big") < holdout * 2**64 else "train"


def _batches(documents: Iterable[Document], min_chars: int, skipped: list[int]) -> Iterator[list[Document]]:
    """Groups of about _BATCH_CHARS characters; counts what is left out in skipped[0]."""
    group: list[Document] = []
    chars = 0
    for document in documents:
        if not document.text.strip() or len(document.text) < min_chars:
            skipped[0] += 1
            continue
        group.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _encode_all(
    batches: Iterator[list[Document]], tokenizer: Tokenizer, dataset: DatasetConfig, workers: int | None
) -> Iterator[_Encoded]:
    """Tokenizes the batches in order; a bounded number of them is in memory at any time."""
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    if count == 0:
        for group in batches:
            yield _encode(tokenizer, group, dataset.bos, dataset.eos)
        return
    # A fresh interpreter per worker: forking a process that runs threads (progress bar, torch) can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        running: deque[Future[_Encoded]] = deque()
        try:
            for group in batches:
                running.append(pool.submit(_encode_in_worker, group, dataset.bos, dataset.eos))
                if len(running) > 2 * count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_in_worker(group: list[Document], bos: bool, eos: bool) -> _Encoded:
    assert _worker_tokenizer is not None
    return _encode(_worker_tokenizer, group, bos, eos)


def _encode(tokenizer: Tokenizer, group: list[Document], bos: bool, eos: bool) -> _Encoded:
    ids = [tokenizer.encode_array(document.text, bos=bos, eos=eos) for document in group]
    sizes = [len(document.text.encode("utf-8", "replace")) for document in group]
    return _Encoded([document.id for document in group], sizes, ids)


def _plain_files(dataset: DatasetConfig) -> list[Path]:
    """The files that are read: those of `source`, or all below its folders."""
    found: list[Path] = []
    for path in dataset.files():
        found += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return found


def _remove_old(folder: Path) -> None:
    """Removes what an interrupted or outdated run left; the manifest first, so that the folder is never half valid."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for file in folder.glob(f"{split}-[0-9]*"):
            file.unlink()


def inspect(folder: str | Path, samples: int = 1, verify: bool = True) -> None:
    """Prints statistics of a prepared corpus, or of every corpus in a folder.

    Args:
        folder: a corpus, or the `output` folder that holds several.
        samples: documents of each split to decode and print the start of.
        verify: read all shards and compare checksums and ids.

    Raises:
        FileNotFoundError: there is no corpus.
        ValueError: a corpus is damaged.
    """
    folder = Path(folder)
    found = [folder] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise FileNotFoundError(f"{folder}: no {MANIFEST} in it or one level below; run `prepare` first")
    for corpus_folder in found:
        manifest = read_manifest(corpus_folder)
        print(f"{corpus_folder}: {manifest.vocab_size} ids of {manifest.tokenizer}, {manifest.skipped} skipped")
        for split in (split for split in SPLITS if manifest.shards.get(split)):
            corpus = Corpus.open(corpus_folder, split)
            if verify:
                corpus.verify()
            _print_split(corpus, samples, verify)


def _print_split(corpus: Corpus, samples: int, verified: bool) -> None:
    quantiles = np.quantile(corpus.document_lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int)
    per_token = corpus.manifest.text_bytes[corpus.split] / corpus.num_tokens
    print(
        f"  {corpus.split}: {corpus.num_documents} documents, {corpus.num_tokens} tokens, "
        f"{per_token:.2f} bytes a token, lengths min {quantiles[0]}, 10% {quantiles[1]}, median {quantiles[2]}, "
        f"90% {quantiles[3]}, max {quantiles[4]}{', checksums right' if verified else ''}"
    )
    try:
        tokenizer = Tokenizer.load(corpus.manifest.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        print(f"  (no sample: {error})")
        return
    if tokenizer.fingerprint != corpus.manifest.fingerprint:
        print(f"  (no sample: {corpus.manifest.tokenizer} is no longer the tokenizer of this corpus)")
        return
    for number in np.linspace(0, corpus.num_documents - 1, min(samples, corpus.num_documents)).astype(int):
        ids = corpus.tokens(int(number), 0, min(60, int(corpus.document_lengths[number])))
        print(f"  document {number}: {tokenizer.decode(ids)!r}")
