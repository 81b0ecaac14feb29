"""Trains `debug_tokenizer.model`: 4,096 ids in the format, split pattern and special tokens of the Llama 4 tokenizer.

A model with 4,096 ids trains in minutes on a laptop; one with 202,048 spends everything in its head. The file is in the
repository, so nobody needs to run this. It is here to show where the file comes from: byte-pair merges of the offline
text, the same amount of each domain so that code does not outvote prose. Equal text gives an equal file, but code and
manuals follow the installed Python and torch, so another machine's file may differ in a few merges.

    mobilellm-pro fetch-text outputs/debug/text
    python tests/assets/make_debug_tokenizer.py outputs/debug/text tests/assets/debug_tokenizer.model
"""

import argparse
import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from mobilellm_pro.data.special_tokens import special_names
from mobilellm_pro.data.tokenizer import SPLIT_PATTERN

VOCABULARY = 4_096
CHARS_PER_DOMAIN = 4_000_000
MAX_TOKEN_CHARS = 16  # keeps rulers such as ======= from taking a rank for every length


def main() -> None:
    """Reads the text folder and the file to write from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="folder of <domain>.jsonl.gz")
    parser.add_argument("model", type=Path, help="file to write")
    arguments = parser.parse_args()
    files = sorted(arguments.text.glob("*.jsonl.gz"))
    if not files:
        raise ValueError(f"{arguments.text}: no *.jsonl.gz; run `mobilellm-pro fetch-text {arguments.text}` first")
    tokens = train(text for file in files for text in first_texts(file))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    arguments.model.write_text("".join(lines))
    print(f"{arguments.model}: {len(tokens)} ranks + {VOCABULARY - len(tokens)} special tokens")


def first_texts(file: Path) -> Iterator[str]:
    """Every n-th document of a domain, cut to 20,000 characters, until CHARS_PER_DOMAIN is reached."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:20_000] for line in lines]
    stride = max(1, sum(map(len, texts)) // CHARS_PER_DOMAIN)
    taken = 0
    for text in texts[::stride]:
        yield text
        taken += len(text)
        if taken >= CHARS_PER_DOMAIN:
            return


def train(texts: Iterator[str]) -> list[bytes]:
    """Tokens in the order of their ranks: the 256 bytes, then the merges."""
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special_names(0)),
        initial_alphabet=alphabet,
        max_token_length=MAX_TOKEN_CHARS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    spelled = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(byte_of[letter] for letter in token) for token, _ in spelled if len(token) > 1]
    return [bytes([byte]) for byte in range(256)] + merged


def byte_letters() -> list[str]:
    """The letter that stands for each byte in the byte-level alphabet: Latin-1 where printable, else from U+0100 on."""
    printable = {byte for byte in range(256) if chr(byte) in pre_tokenizers.ByteLevel.alphabet()}
    moved = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]


if __name__ == "__main__":
    main()
