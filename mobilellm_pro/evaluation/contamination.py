"""Which documents of an evaluation stand in the training text, by common runs of tokens.

    contamination("outputs/merged/evaluation", {"web": "outputs/tokens/web"}, Tokenizer.load("llama4"))

A document overlaps a corpus when some `ngram` consecutive tokens of its text are consecutive tokens of one training
document. Hashes only choose what is looked at: every hit is confirmed by the ids, so the answer is exact, neither a
chance hit nor a miss. All n-grams of the evaluation are in memory (about 60 bytes each); the corpora are read once, a
block at a time, so memory does not grow with them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.comparison import markdown_table, percent
from mobilellm_pro.evaluation.paired_difference import mean_and_error
from mobilellm_pro.evaluation.scored_documents import Evaluation, read_evaluation

NAME = "contamination"
EXAMPLES = 5
_BLOCK_TOKENS = 2**20
_CHUNK_DOCUMENTS = 2**20  # documents are located in steps of this many
_FACTOR, _BASE = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd, bits of no pattern
_BITS = (10, 30)  # least and most of the filter's size, as a power of two


def contamination(
    evaluation: str | Path,
    corpora: Mapping[str, str | Path],
    tokenizer: Tokenizer,
    *,
    ngram: int = 13,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Finds the evaluation's documents that overlap the training split of corpora, and the scores without them.

    Ids are compared as they are, without normalising case or spaces. What that misses: text that was tokenized in other
    pieces, which happens at both ends of a quotation (where the text begins in the middle of a line, its first token
    lacks the space before it), so a run must be a token or two longer than `ngram` to be found for sure; and text with
    other spaces, quotation marks or line ends. A whole corpus is searched, also what a job's limits on documents or
    clusters leave out. The held-out splits are not.

    Writes contamination.json and contamination.md, and prints the table.

    Args:
        evaluation: folder of an evaluation, whose samples hold the text of the documents.
        corpora: name -> folder made by `prepare` with this tokenizer.
        tokenizer: of the corpora; the evaluation's text is encoded with it.
        ngram: consecutive tokens that count as an overlap. A shorter document cannot be checked: it counts as
            too short, and neither as clean nor as overlapping.
        output: folder to write to; default: the evaluation's.

    Returns:
        what contamination.json holds: where from, ngram, tokenizer, corpora, and of each column documents, too_short,
        overlapping, share (of those checked; None without any), corpora (name -> documents that overlap it), examples,
        and scores (of all, clean and overlapping documents: documents, score as a fraction, stderr).

    Raises:
        FileNotFoundError: no such corpus.
        ValueError: ngram below 1; no corpus; one of another tokenizer or without training part; samples without text.
    """
    if ngram < 1:
        raise ValueError(f"ngram = {ngram}: expected at least 1 token; 13 is usual")
    if not corpora:
        raise ValueError("corpora: none, expected at least one: name those that the model was trained on")
    found = read_evaluation(evaluation)
    opened = {name: Corpus.open(path, "train", fingerprint=tokenizer.fingerprint) for name, path in corpora.items()}
    record: dict[str, Any] = {
        "evaluation": str(evaluation),
        "suite": found.suite,
        "checkpoint": found.checkpoint,
        "ngram": ngram,
        "tokenizer": {"source": tokenizer.source, "fingerprint": tokenizer.fingerprint},
        "corpora": {name: {"path": str(one.folder), "content": one.content, "documents": one.num_documents,
                           "tokens": one.num_tokens} for name, one in opened.items()},
        "columns": _column_records(found, opened, tokenizer, ngram),
    }  # fmt: skip
    target = Path(evaluation if output is None else output)
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / f"{NAME}.json", json.dumps(record, indent=2) + "\n")
    write_atomically(target / f"{NAME}.md", contamination_markdown(record))
    print(markdown_table(*contamination_table(record)))
    return record


class NgramIndex:
    """All n-grams of some documents, to be searched for in corpora.

    An n-gram's *place* is its number among all n-grams of the documents, sorted by hash; equal hashes form a *row*.
    """

    def __init__(self, documents: Sequence[np.ndarray], ngram: int) -> None:
        """Hashes the n-grams.

        Args:
            documents: int32 [tokens] each; those shorter than `ngram` have no n-gram.
            ngram: tokens of an n-gram, 1 or more.
        """
        self.ngram = ngram
        self._ids = np.concatenate([np.empty(0, np.int32), *documents])
        self._ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        hashes = ngram_hashes(self._ids, ngram)
        starts = np.flatnonzero(within_documents(np.arange(len(hashes)), self._ends, ngram))
        order = np.argsort(hashes[starts], kind="stable")
        self._starts = starts[order]
        self._hashes, firsts = np.unique(hashes[self._starts], return_index=True)
        self._firsts = np.append(firsts, len(starts)).astype(np.int64)
        bits = int(np.clip(np.ceil(np.log2(16 * len(self._hashes) + 1)), *_BITS))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(2**bits, dtype=bool)
        self._filter[self._slots(self._hashes)] = True

    def search(self, corpus: Corpus) -> dict[int, int]:
        """Number of a document -> the first token of its first n-gram in the corpus, for documents that have one."""
        found = np.zeros(len(self._starts), dtype=bool)
        finished = np.zeros(len(self._hashes), dtype=bool)  # rows of which every place is found: nothing left to learn
        with tqdm(total=corpus.num_tokens, desc=corpus.name, unit="token", unit_scale=True, disable=None) as bar:
            for ids, ends in corpus_blocks(corpus, self.ngram) if len(found) else ():  # else all are too short
                positions, rows = self._candidates(ids, ends, finished)
                if len(rows):
                    windows = np.lib.stride_tricks.sliding_window_view(ids, self.ngram)[positions]
                    self._confirm(windows, rows, found, finished)
                bar.update(min(len(ids), _BLOCK_TOKENS))
        starts = np.sort(self._starts[found])
        documents, first = np.unique(np.searchsorted(self._ends, starts, side="right"), return_index=True)
        begins = np.concatenate(([0], self._ends))[documents]
        return dict(zip(documents.tolist(), (starts[first] - begins).tolist(), strict=True))

    def _slots(self, hashes: np.ndarray) -> np.ndarray:
        """Places of hashes in the filter: their first bits."""
        return (hashes >> self._shift).astype(np.int64)

    def _candidates(self, ids: np.ndarray, ends: np.ndarray, finished: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Starts of n-grams whose hash is known and not finished, and the rows of those."""
        hashes = ngram_hashes(ids, self.ngram)
        positions = np.flatnonzero(self._filter[self._slots(hashes)])
        positions = positions[within_documents(positions, ends, self.ngram)]
        rows = np.minimum(np.searchsorted(self._hashes, hashes[positions]), len(self._hashes) - 1)
        kept = (self._hashes[rows] == hashes[positions]) & ~finished[rows]
        return positions[kept], rows[kept]

    def _confirm(self, windows: np.ndarray, rows: np.ndarray, found: np.ndarray, finished: np.ndarray) -> None:
        """Compares n-grams of a corpus [candidates, ngram] with all places of their rows; marks what is equal."""
        order = np.argsort(rows, kind="stable")
        windows, rows = windows[order], rows[order]
        new = np.ones(len(rows), dtype=bool)  # a row has one content but for chance: repeats follow each other
        new[1:] = (rows[1:] != rows[:-1]) | (windows[1:] != windows[:-1]).any(axis=1)
        windows, rows = windows[new], rows[new]
        counts = self._firsts[rows + 1] - self._firsts[rows]
        which = np.repeat(np.arange(len(rows)), counts)
        places = np.arange(len(which)) + np.repeat(self._firsts[rows] - (np.cumsum(counts) - counts), counts)
        equal = np.ones(len(which), dtype=bool)
        for token in range(self.ngram):
            equal &= self._ids[self._starts[places] + token] == windows[which, token]
        found[places[equal]] = True
        finished[rows] = True
        finished[rows[which[~found[places]]]] = False


def ngram_hashes(ids: np.ndarray, ngram: int) -> np.ndarray:
    """uint64 [tokens - ngram + 1], one for every n-gram of ids [tokens]; empty where there is none.

    The polynomial sum of ids[i + j] * base^(ngram - 1 - j) modulo 2^64, put together from hashes of 1, 2, 4, ...
    tokens: twice log2(ngram) steps over the array instead of ngram.
    """
    if len(ids) < ngram:
        return np.empty(0, dtype=np.uint64)

    def joined(left: np.ndarray, right: np.ndarray, left_tokens: int, right_tokens: int) -> np.ndarray:
        count = len(ids) - left_tokens - right_tokens + 1
        power = np.uint64(pow(_BASE, right_tokens, 2**64))
        return left[:count] * power + right[left_tokens : left_tokens + count]

    doubled, tokens = ids.astype(np.uint64) * np.uint64(_FACTOR), 1
    whole, done = np.zeros(len(ids) + 1, dtype=np.uint64), 0
    while True:
        if ngram & tokens:
            whole, done = joined(whole, doubled, done, tokens), done + tokens
        if done == ngram:
            return whole
        doubled, tokens = joined(doubled, doubled, tokens, tokens), 2 * tokens


def within_documents(starts: np.ndarray, ends: np.ndarray, ngram: int) -> np.ndarray:
    """Which n-grams cross no border: bool like starts; ends [documents] are the sums of the documents' tokens."""
    return starts + ngram <= ends[np.searchsorted(ends, starts, side="right")] if len(starts) else starts.astype(bool)


def corpus_blocks(corpus: Corpus, ngram: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A split in blocks of about a million tokens: ids [tokens], and the ends of the documents in them.

    A longer document is cut into pieces that share ngram - 1 tokens, so that each of its n-grams is in one of them.
    """
    for first in range(0, corpus.num_documents, _CHUNK_DOCUMENTS):
        numbers = np.arange(first, min(first + _CHUNK_DOCUMENTS, corpus.num_documents))
        shards, begins, lengths = corpus.locate(numbers)
        sums, start = np.cumsum(lengths), 0
        while start < len(numbers):
            most = sums[start] - lengths[start] + _BLOCK_TOKENS
            stop = max(start + 1, int(np.searchsorted(sums, most, side="right")))
            part = slice(start, stop)
            for cut in range(0, int(sums[stop - 1]) - int(sums[start] - lengths[start]) or 1, _BLOCK_TOKENS):
                counts = np.minimum(lengths[part] - cut, _BLOCK_TOKENS + ngram - 1)
                yield _read(corpus, numbers[part], shards[part], begins[part] + cut, counts), np.cumsum(counts)
            start = stop


def _read(corpus: Corpus, numbers: np.ndarray, *places: np.ndarray) -> np.ndarray:
    """Ids of documents or parts of them, joined; places: shards, first tokens, numbers of tokens.

    Read from the files, documents that follow each other at once: the maps are set up for reads here and there, and
    are slow from one end to the other.
    """
    shards, begins, counts = places
    ends = begins + counts
    borders = np.flatnonzero((shards[1:] != shards[:-1]) | (begins[1:] != ends[:-1])) + 1
    parts = []
    for first, last in zip([0, *borders.tolist()], [*borders.tolist(), len(numbers)]):
        dtype, path = corpus.shard_ids[shards[first]].dtype, corpus.binary_of(int(numbers[first]))
        count, offset = int(ends[last - 1] - begins[first]), int(begins[first]) * dtype.itemsize
        parts.append(np.fromfile(path, dtype, count, offset=offset))
    return np.concatenate(parts)


def _column_records(
    evaluation: Evaluation, corpora: Mapping[str, Corpus], tokenizer: Tokenizer, ngram: int
) -> dict[str, Any]:
    """Searches for the documents of all columns at once, so that each corpus is read once."""
    columns = {key: evaluation.documents(key, text=True) for key in evaluation.columns}
    ids = [tokenizer.encode_array(one.text) for column in columns.values() for one in column]
    index = NgramIndex(ids, ngram)
    overlaps = {name: index.search(corpus) for name, corpus in corpora.items()}
    records: dict[str, Any] = {}
    for key, documents in columns.items():
        first = sum(record["documents"] for record in records.values())
        numbers = range(first, first + len(documents))
        hits = [{name: one[at] for name, one in overlaps.items() if at in one} for at in numbers]
        said = {what: getattr(evaluation.columns[key], what) for what in ("name", "metric")}
        examples = [
            {"task": one.task, "doc_id": one.doc_id, "corpus": name, "text": tokenizer.decode(ids[at][start:][:ngram])}
            for at, one, hit in zip(numbers, documents, hits) for name, start in [*hit.items()][:1]
        ]  # fmt: skip
        short = np.array([len(ids[at]) < ngram for at in numbers], dtype=bool)
        scores, overlapping = np.array([one.score for one in documents]), np.array([*map(bool, hits)], dtype=bool)
        records[key] = said | _counts(scores, short, overlapping)
        of_corpora = {name: sum(name in hit for hit in hits) for name in corpora}
        records[key] |= {"corpora": of_corpora, "examples": examples[:EXAMPLES]}
    return records


def _counts(scores: np.ndarray, short: np.ndarray, overlapping: np.ndarray) -> dict[str, Any]:
    """Of a column's documents, [documents] each: score, whether it cannot be checked, whether some corpus has it."""
    checked = int((~short).sum())
    groups = {"all": scores, "clean": scores[~short & ~overlapping], "overlapping": scores[overlapping]}
    means = {name: (len(one), *(mean_and_error(one) if len(one) else (None, None))) for name, one in groups.items()}
    return {
        "documents": len(scores),
        "too_short": len(scores) - checked,
        "overlapping": int(overlapping.sum()),
        "share": int(overlapping.sum()) / checked if checked else None,
        "scores": {name: dict(zip(("documents", "score", "stderr"), one)) for name, one in means.items()},
    }


def contamination_table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str | None]]]:
    """Header and rows, a row a column of the suite."""
    rows = []
    for one in record["columns"].values():
        counts = [f"{one[what]:,}" for what in ("documents", "too_short", "overlapping")]
        corpora = ", ".join(f"{name} {count:,}" for name, count in one["corpora"].items() if count)
        scores = [percent(group["score"], group["stderr"]) for group in one["scores"].values()]
        rows.append([one["name"], one["metric"], *counts, percent(one["share"]), corpora or None, *scores])
    columns = "task, metric, documents, too short, overlapping, share, corpora, all, clean, only overlapping"
    return columns.split(", "), rows


def contamination_markdown(record: Mapping[str, Any]) -> str:
    """contamination.md: the table, then the examples of each column."""
    legend = (
        f"Overlapping: {record['ngram']} consecutive tokens stand in a training document. Too short: fewer tokens than "
        "that, not checked and not clean. Share (%): of those checked. All, clean, only overlapping: mean of the "
        "documents' scores in percent ± its standard error."
    )
    table = markdown_table(*contamination_table(record))
    parts = [f"# Contamination of suite {record['suite']}, {record['checkpoint']}", table, legend]
    examples = [
        [key, one["task"], str(one["doc_id"]), one["corpus"], json.dumps(one["text"], ensure_ascii=False)]
        for key, column in record["columns"].items()
        for one in column["examples"]
    ]
    if examples:
        parts += ["## Examples", markdown_table(["column", "task", "document", "corpus", "common tokens"], examples)]
    return "\n\n".join(parts) + "\n"
