"""What is in a prepared corpus: the `inspect` verb.

mobilellm-pro inspect outputs/debug/tokens
mobilellm-pro inspect outputs/debug/tokens/code --samples 3 --no-verify
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from mobilellm_pro.data.clusters import REPORT, read_clusters
from mobilellm_pro.data.corpus_parts import PLAN, Plan, read_part, read_plan
from mobilellm_pro.data.manifest import FILE as MANIFEST
from mobilellm_pro.data.manifest import read_manifest
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_CHUNK_DOCUMENTS = 2**20
_SAMPLE_TOKENS = 60


def inspect(folder: str | Path, samples: int = 1, verify: bool = True) -> None:
    """Prints statistics of a prepared corpus, or of every corpus in a folder.

    Args:
        folder: a corpus, or the `output` folder that holds several; unfinished ones tell how far they are.
        samples: documents of each split to decode and print the start of.
        verify: read all shards and compare checksums and ids.

    Raises:
        FileNotFoundError: there is no corpus.
        ValueError: a corpus is damaged.
    """
    folder = Path(folder)
    candidates = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    found = [path for path in candidates if (path / MANIFEST).exists() or (path / PLAN).exists()]
    if not found:
        raise FileNotFoundError(f"{folder}: no {MANIFEST} in it or one level below; run `prepare` first")
    for corpus_folder in found[:1] if found[0] == folder else found:
        if (corpus_folder / MANIFEST).exists():
            _print_corpus(corpus_folder, samples, verify)
        else:
            plan = read_plan(corpus_folder)
            assert plan is not None
            _print_unfinished(corpus_folder, plan)


def length_quantiles(corpus: Corpus, quantiles: tuple[float, ...] = QUANTILES) -> np.ndarray:
    """Tokens of the documents at each quantile, each the length of a document of the corpus.

    The lengths are counted a chunk of documents at a time: memory grows with the number of different lengths only.

    Args:
        corpus: of at least one document.
        quantiles: shares from 0 to 1.

    Returns:
        int64 [quantiles].
    """
    values, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for first in range(0, corpus.num_documents, _CHUNK_DOCUMENTS):
        chunk = corpus.lengths(first, min(first + _CHUNK_DOCUMENTS, corpus.num_documents))
        new_values, new_counts = np.unique(chunk, return_counts=True)
        both = np.concatenate((values, new_values))
        values, places = np.unique(both, return_inverse=True)
        counts = np.bincount(places, np.concatenate((counts, new_counts))).astype(np.int64)
    ranks = np.rint(np.array(quantiles) * (corpus.num_documents - 1)).astype(np.int64)
    return values[np.searchsorted(np.cumsum(counts), ranks, side="right")]


def _print_unfinished(folder: Path, plan: Plan) -> None:
    missing = set(plan.missing_parts(folder))
    done = [read_part(folder, number) for number in range(len(plan.parts)) if number not in missing]
    shards = [shard for record in done for records in record.shards.values() for shard in records]
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    print(
        f"{folder}: unfinished, {len(done)} of {len(plan.parts)} parts done ({documents} documents, {tokens} tokens); "
        "run `prepare` again for the rest"
    )


def _print_corpus(folder: Path, samples: int, verify: bool) -> None:
    manifest = read_manifest(folder)
    print(f"{folder}: {manifest.vocab_size} ids of {manifest.tokenizer}, {manifest.skipped_counts()}")
    record = read_clusters(folder)
    if record is not None:
        print(f"  {record.sizes()}, described in {REPORT}")
    for split in (split for split, shards in manifest.shards.items() if shards):
        corpus = Corpus.open(folder, split)
        if verify:
            files = [folder / f"{shard.name}{end}" for shard in manifest.shards[split] for end in (".bin", ".idx")]
            total = sum(file.stat().st_size for file in files)
            with tqdm(total=total, desc=f"{folder.name} {split}", unit="B", unit_scale=True, disable=None) as bar:
                corpus.verify(bar.update)
            if record is not None:
                assert corpus.clusters.number, "opening them checks them"
        _print_split(corpus, verify)
        _print_samples(corpus, samples)


def _print_split(corpus: Corpus, verified: bool) -> None:
    low, tenth, median, ninetieth, high = length_quantiles(corpus)
    per_token = corpus.manifest.text_bytes[corpus.split] / max(corpus.num_tokens, 1)
    print(
        f"  {corpus.split}: {corpus.num_documents} documents, {corpus.num_tokens} tokens, "
        f"{per_token:.2f} bytes a token, lengths min {low}, 10% {tenth}, median {median}, "
        f"90% {ninetieth}, max {high}{', checksums right' if verified else ''}"
    )


def _print_samples(corpus: Corpus, samples: int) -> None:
    try:
        tokenizer = Tokenizer.load(corpus.manifest.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        print(f"  (no sample: {error})")
        return
    if tokenizer.fingerprint != corpus.manifest.fingerprint:
        print(f"  (no sample: {corpus.manifest.tokenizer} is no longer the tokenizer of this corpus)")
        return
    for number in np.linspace(0, corpus.num_documents - 1, min(samples, corpus.num_documents)).astype(int).tolist():
        length = int(corpus.lengths(number, number + 1)[0])
        print(f"  document {number}: {tokenizer.decode(corpus.tokens(number, 0, min(_SAMPLE_TOKENS, length)))!r}")
