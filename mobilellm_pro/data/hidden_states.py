"""The teacher's last hidden states on disk: written once, read by every run that meets the same rows again.

A token costs 10 KB at Scout's width in bfloat16 and 5 KB in float8 (e4m3 with a scale per token), beside 404 KB for its
logits, and what is read in the teacher's own data type is what the teacher computed, to the bit. What the cache holds
is addressed by row of a corpus, not by step: row j of a corpus is the same whatever the weights of the mixture, so one
cache serves all specialists and ablations over the same corpora, sequence length, seed and packing.

    [teacher]                          # once, with the teacher loaded
    cache = "write"
    cache_path = "/shared/scout_cache"

    [teacher]                          # every later run: no teacher body is loaded
    cache = "read"
    cache_path = "/shared/scout_cache"

Every rank writes files of its own. Rows that are there are not written again, so a job that was stopped goes on, and a
longer run adds what is missing. Readers assemble a row from entries of any split along the sequence, compare sha256 of
every entry with its file's header, and hold no file open: a copy in a worker process costs nothing.

`hidden_state_files` has the format, `hidden_state_folder` says whose a folder is, `hidden_state_index` finds holes,
`training/hidden_state_cache` checks a job.

Shapes: B rows, S tokens of a row or this rank's part of them, T tokens of an entry, D width of the teacher.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from mobilellm_pro.data.hidden_state_files import (
    DTYPES,
    REWRITE,
    TEMPORARY,
    CacheKey,
    CorpusKey,
    Entry,
    byte_view,
    decode,
    encode,
    write_file,
)
from mobilellm_pro.data.hidden_state_folder import claim_cache
from mobilellm_pro.data.hidden_state_index import CorpusIndex, Place

# A reader takes an entry as a whole, because of its sha256. Under context parallelism a rank shall read its part of a
# long row and little else. 42 MB at Scout's width in bfloat16: still one long read for any disk.
ENTRY_TOKENS = 4096
_STALE_SECONDS = 3600  # nobody needs so long for one file: its writer is dead


class HiddenStateWriter:
    """Collects entries of one rank and writes them as files, in a thread beside the training loop."""

    def __init__(
        self, folder: Path, cache: CacheKey, corpora: Sequence[CorpusKey], *, file_bytes: int, teacher_path: str
    ) -> None:
        """
        Args:
            folder: of the cache, shared by all ranks; made if need be.
            cache: whose hidden states, and how they are stored.
            corpora: whose rows may come.
            file_bytes: at so many collected bytes the corpus with most of them gets a file. A larger entry is a file
                of its own.
            teacher_path: noted in cache.json for whoever reads it.

        Raises:
            ValueError: the folder is the cache of another teacher or number format, or a damaged file is in it.
        """
        claim_cache(folder, cache, teacher_path)
        self._folder, self._cache, self._file_bytes = folder, cache, file_bytes
        self._indexes = {key: CorpusIndex.open(folder, cache, key) for key in corpora}
        self._entries: dict[CorpusKey, list[Entry]] = {key: [] for key in corpora}
        self._seen: set[tuple[CorpusKey, int, int]] = set()
        self._thread = ThreadPoolExecutor(1, "hidden-states")
        self._under_way: Future[Path] | None = None
        _remove_stale(folder, corpora)

    def add(self, corpora: Sequence[CorpusKey], rows: Sequence[int], hidden_BSD: Tensor, *, first: int = 0) -> None:
        """Takes the hidden states of a micro-batch; those that are on disk already are left out.

        Args:
            corpora: [B], the corpus of each row.
            rows: [B], the row's number in its corpus.
            hidden_BSD: of the tokens first .. first + S - 1 of each row, on any device; they are copied.
            first: token of the row at which this rank's part begins.

        Raises:
            ValueError: a file could not be written, or hidden states of another width or data type than the cache's.
        """
        for key, row, hidden_SD in zip(corpora, rows, hidden_BSD.detach(), strict=True):
            for start, stop in _pieces(first, first + len(hidden_SD)):
                self._add(key, row, start, hidden_SD[start - first : stop - first])

    def _add(self, key: CorpusKey, row: int, first: int, hidden_TD: Tensor) -> None:
        """Takes one entry, unless it is there."""
        begin = row * key.seq_len + first
        if (key, row, first) in self._seen or self._indexes[key].holds(begin, begin + len(hidden_TD)):
            return
        self._seen.add((key, row, first))
        values, scale = encode(hidden_TD, self._cache)
        values = values.to("cpu", copy=True).contiguous()
        self._entries[key].append(Entry(row, first, values, None if scale is None else scale.cpu()))
        while sum(map(self._collected, self._entries)) >= self._file_bytes:
            self._write(max(self._entries, key=self._collected))

    def flush(self) -> None:
        """Returns when everything that was added is on disk; raises ValueError where a file could not be written."""
        for key, entries in self._entries.items():
            if entries:
                self._write(key)
        self._wait()

    def close(self) -> None:
        """`flush`, and the end of the thread."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()

    def _collected(self, key: CorpusKey) -> int:
        return sum(entry.num_bytes for entry in self._entries[key])

    def _write(self, key: CorpusKey) -> None:
        """Hands the entries of a corpus to the thread; at most one file is under way, which bounds the memory."""
        self._wait()
        entries, self._entries[key] = self._entries[key], []
        self._under_way = self._thread.submit(write_file, self._folder, self._cache, key, entries)

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()


class HiddenStateReader:
    """Hidden states of any rows, as the teacher computed them."""

    def __init__(
        self, indexes: Sequence[CorpusIndex], cache: CacheKey, *, pieces: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """
        Args:
            indexes: of the corpora, in the mixture's order.
            cache: whose hidden states, and how they are stored.
            pieces: stretches of each row to read, as first token and the one after the last: this rank's under context
                parallelism; default the whole row.
        """
        self._indexes, self._cache = list(indexes), cache
        self._pieces = [(0, indexes[0].key.seq_len)] if pieces is None else list(pieces)

    def read(self, corpora: Sequence[int], rows: Sequence[int]) -> Tensor:
        """[B, S, D] in the teacher's data type, on the CPU.

        Args:
            corpora: [B], index of each row's corpus.
            rows: [B], the row's number in its corpus.

        Raises:
            ValueError: a hole, or a file that was truncated, changed or removed; file, corpus and row are named.
        """
        lengths = [end - begin for begin, end in self._pieces]
        shape = len(rows), sum(lengths), self._cache.hidden_size
        out_BSD = torch.empty(shape, dtype=DTYPES[self._cache.dtype])
        for out_SD, corpus, row in zip(out_BSD, corpora, rows, strict=True):
            for (first, _), out_TD in zip(self._pieces, out_SD.split(lengths), strict=True):
                self._fill(self._indexes[corpus], row, first, out_TD)
        return out_BSD

    def _fill(self, index: CorpusIndex, row: int, first: int, out_SD: Tensor) -> None:
        begin = row * index.key.seq_len + first
        end, filled = begin + len(out_SD), begin
        for place in index.places(begin, end):
            if place.begin > filled:
                break
            stop = min(place.end, end)
            try:
                self._copy(place, filled - place.begin, out_SD[filled - begin : stop - begin])
            except (OSError, ValueError) as error:
                raise ValueError(f"{place.path}: hidden states of {index.key}, row {row}: {error}: {REWRITE}") from None
            filled = stop
        if filled < end:
            raise ValueError(
                f"the cache of hidden states lacks row {row} of {index.key} from its token {filled - begin} on: write "
                'it with teacher.cache = "write"'
            )

    def _copy(self, place: Place, skipped: int, out_TD: Tensor) -> None:
        """Copies tokens of an entry from its token `skipped` on; the whole entry is read and checked."""
        num_tokens, stored = place.end - place.begin, DTYPES[self._cache.stored]
        direct = len(out_TD) == num_tokens and stored == out_TD.dtype
        values = out_TD if direct else torch.empty(num_tokens, out_TD.shape[1], dtype=stored)
        scale = None if place.scale < 0 else torch.empty(num_tokens, dtype=torch.float32)
        digest = hashlib.sha256()
        with place.path.open("rb", buffering=0) as file:
            for offset, tensor in ((place.values, values), (place.scale, scale)):
                if tensor is None:
                    continue
                view = byte_view(tensor)
                file.seek(offset)
                done = 0
                while count := file.readinto(view[done:]):
                    done += count
                if done < len(view):
                    raise ValueError(f"ends at byte {offset + done:,}")
                digest.update(view)
        if digest.digest() != place.sha256:
            raise ValueError("sha256 differs from the one in the header, the file was changed")
        if not direct:
            part = slice(skipped, skipped + len(out_TD))
            decode(values[part], None if scale is None else scale[part], out_TD)


def _pieces(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Splits tokens first .. end - 1 of a row into entries, at the same tokens whatever part of the row they are."""
    while first < end:
        stop = min(end, first - first % ENTRY_TOKENS + ENTRY_TOKENS)
        yield first, stop
        first = stop


def _remove_stale(folder: Path, corpora: Sequence[CorpusKey]) -> None:
    """Removes what killed processes left half-written."""
    for name in {key.name for key in corpora}:
        for path in (folder / name).glob(f"*{TEMPORARY}"):
            try:
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:  # another rank was faster
                pass
