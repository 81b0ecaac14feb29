"""Text to token ids and back, for any tokenizer file in tiktoken's format.

The file holds one ordinary token a line (base64 bytes, then its rank); special tokens are appended after the ranks. Two
sources are known: a path, and the word "llama4", which stands for the real tokenizer of 202,048 ids. That file is not
ours to redistribute, so it is read at run time from the installed package `llama-models` (found without importing it)
and its checksum is verified.

    tokenizer = Tokenizer.load("llama4")
    ids = tokenizer.encode("Hello", bos=True)
"""

import base64
import binascii
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from mobilellm_pro.data.special_tokens import BOS, EOS, PAD, STOPS, special_names

# The public O200K split: how text is cut into pieces before byte pairs are merged inside each piece.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS_AND_LINES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
)
_SPACES = (r"\s+(?!\S)", r"\s+")
SPLIT_PATTERN = "|".join((*_WORDS_AND_LINES, *_SPACES))
# The same alternatives in the same order: in a group of their own, those without a look ahead are tried by tiktoken's
# fast engine together instead of one after another, which saves a seventh of the time.
_GROUPED_PATTERN = "|".join((f"(?:{'|'.join(_WORDS_AND_LINES)})", *_SPACES))

LLAMA4_PACKAGE_FILE = "llama_models/llama4/tokenizer.model"
LLAMA4_SHA256 = "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed"
LLAMA4_INSTALL = "pip install --no-deps llama-models==0.3.0"

# Inside one piece of the split the merges take more than linear time and memory, so a run of one character must be cut
# before it gets there. The limits are those of the published Llama tokenizers: ids of very long documents agree too.
MAX_CHUNK_CHARS = 400_000
MAX_RUN_CHARS = 25_000
# The look behind makes it linear: without it, a run just below the limit is scanned again from each of its characters.
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN_CHARS + 1},}}|(?<!\s)\s{{{MAX_RUN_CHARS + 1},}}")
_RUN = re.compile(r"\S+|\s+")


class Tokenizer:
    """Byte-pair tokenizer with the special tokens of Llama 4.

    Attributes:
        source: what `load` was called with.
        vocab_size: ranks plus special tokens.
        special_ids: name -> id of every special token.
        bos_id, eos_id, pad_id: ids of begin of text, end of text and padding.
    """

    def __init__(self, ranks: dict[bytes, int], source: str) -> None:
        """Builds the tokenizer from `ranks` (token bytes -> 0 .. n-1, checked); see `load` for files."""
        _check_ranks(ranks, source)
        self.source = source
        self.ranks = ranks
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(special_names(len(ranks)))}
        self.vocab_size = len(ranks) + len(self.special_ids)
        self.bos_id, self.eos_id, self.pad_id = (self.special_ids[name] for name in (BOS, EOS, PAD))
        # tiktoken looks for special names in every text, sooner for one than for all; none of them is wanted.
        self._encoding = tiktoken.Encoding(
            "mobilellm_pro", pat_str=_GROUPED_PATTERN, mergeable_ranks=ranks, special_tokens={EOS: self.eos_id}
        )

    @classmethod
    def load(cls, source: str) -> "Tokenizer":
        """Reads a tokenizer file.

        Args:
            source: path of a tiktoken-format file, or "llama4" for the file of the installed `llama-models` package.

        Raises:
            FileNotFoundError: there is no such file, or the package is not installed.
            ValueError: the file is damaged, or it is not the published Llama 4 file although "llama4" was asked for.
        """
        path = find_llama4_file() if str(source) == "llama4" else Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f'tokenizer file {path} does not exist: correct the path, or say "llama4" and {LLAMA4_INSTALL}'
            )
        content = path.read_bytes()
        if str(source) == "llama4":
            _check_llama4(content, path)
        return cls(_parse_ranks(content, path), str(source))

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`; a special name written in the text is ordinary text, never a special token."""
        return self.encode_array(text, bos=bos, eos=eos).tolist()

    def encode_array(self, text: str, *, bos: bool = False, eos: bool = False) -> np.ndarray:
        """Like `encode`, as int32 [tokens]: a document of hundreds of megabytes costs 4 bytes a token, not 36."""
        parts = [np.array([self.bos_id] if bos else [], dtype=np.int32)]
        parts += [self.encode_piece(piece) for piece in self.encode_pieces(text)]
        if eos:
            parts.append(np.array([self.eos_id], dtype=np.int32))
        return np.concatenate(parts)

    def encode_pieces(self, text: str) -> Iterator[str]:
        """Cuts text of any length into pieces whose ids, joined in order, are those of `encode_array(text)`.

        A piece has at most MAX_CHUNK_CHARS characters and no run of spaces or of other characters over MAX_RUN_CHARS.
        Pieces do not depend on each other, so several threads can encode one long document.
        """
        for start in range(0, len(text), MAX_CHUNK_CHARS):
            chunk = text[start : start + MAX_CHUNK_CHARS]
            done = 0
            for run in _LONG_RUN.finditer(chunk) if _has_long_run(chunk) else ():
                for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                    yield chunk[done:cut]
                    done = cut
            yield chunk[done:]

    def encode_piece(self, piece: str) -> np.ndarray:
        """Ids of one piece of `encode_pieces`, int32 [tokens], read-only; other threads of Python run meanwhile.

        The ids come as a buffer: a list of Python integers would hold the interpreter lock and be copied once more.
        """
        try:
            # () names no special token to refuse: their names in the text are text.
            ids = self._encoding.encode_to_numpy(piece, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD
            whole = piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._encoding.encode_to_numpy(whole, disallowed_special=())
        return ids.view(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; bytes that are not UTF-8 (a cut character) become U+FFFD.

        Raises:
            ValueError: an id is outside [0, vocab_size).
        """
        wrong = [int(i) for i in ids if not 0 <= int(i) < self.vocab_size]
        if wrong:
            raise ValueError(
                f"token id {wrong[0]} is outside the vocabulary of {self.source} (0 to {self.vocab_size - 1}): "
                "the ids were made by another tokenizer or model"
            )
        return b"".join([self._bytes[int(i)] for i in ids]).decode("utf-8", "replace")

    @cached_property
    def _bytes(self) -> list[bytes]:
        """What each id stands for; a special token for its name."""
        ordinary = sorted(self.ranks, key=self.ranks.__getitem__)
        return ordinary + [name.encode() for name in self.special_ids]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Special tokens that end a continuation: of the text, of a turn, of a message."""
        return tuple(self.special_ids[name] for name in STOPS if name in self.special_ids)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes that each id stands for, 0 for special tokens; for bits per byte."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ranks, special tokens and split pattern: equal fingerprints give equal ids for every text."""
        digest = hashlib.sha256(SPLIT_PATTERN.encode())
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(b"\n%d %s" % (rank, token.hex().encode()))
        for name, token_id in self.special_ids.items():
            digest.update(b"\n%d %s" % (token_id, name.encode()))
        return digest.hexdigest()

    def __reduce__(self) -> tuple:
        """Pickles as its ranks, so that a tokenizer can go to a worker process."""
        return Tokenizer, (self.ranks, self.source)


def find_llama4_file() -> Path:
    """Path of the real Llama 4 tokenizer inside the installed `llama-models` package.

    Found by looking along `sys.path`: importing the package would run its code and pull in what it depends on.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    for folder in sys.path:
        path = Path(folder or ".") / LLAMA4_PACKAGE_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(f'tokenizer "llama4" needs the file {LLAMA4_PACKAGE_FILE}: {LLAMA4_INSTALL}')


def _check_llama4(content: bytes, path: Path) -> None:
    """Raises ValueError when the file is not the published one."""
    found = hashlib.sha256(content).hexdigest()
    if found != LLAMA4_SHA256:
        raise ValueError(
            f"{path}: sha256 is {found}, expected {LLAMA4_SHA256}; the file is damaged or of another release: "
            f"{LLAMA4_INSTALL} --force-reinstall"
        )


def _parse_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, in the order of the file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            key, value = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f'{path}, line {number}: expected "<base64 token> <rank>", found {line[:60]!r}; '
                f"the file is damaged or not in tiktoken's format: copy it again (Llama 4: {LLAMA4_INSTALL})"
            ) from None
        if key in ranks:
            raise ValueError(f"{path}, line {number}: token {key!r} occurs twice; copy the file again")
        ranks[key] = value
    return ranks


def _check_ranks(ranks: dict[bytes, int], source: str) -> None:
    """Raises ValueError unless ranks are 0 .. n-1 and every single byte is a token."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{source}: the {len(ranks)} ranks are not the numbers 0 to {len(ranks) - 1}, each once; "
            "the file is truncated or damaged: copy it again"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of the 256 single bytes have no token (first: {missing[0]:#04x}), so some text "
            "could not be encoded; the file is truncated or empty: copy it again"
        )


def _has_long_run(chunk: str) -> bool:
    """False when no run is over MAX_RUN_CHARS, found out by looking at a few characters of ordinary text.

    A run that long covers at least one whole window of half its length, so only windows of one kind need a closer look.
    """
    window = MAX_RUN_CHARS // 2
    for start in range(0, len(chunk) - window + 1, window):
        run = _RUN.match(chunk, start, start + window)
        if run and run.end() == start + window:
            return True
    return False
