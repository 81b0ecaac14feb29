"""Sections `tokenize` and `document` of data.py: speed and memory of `prepare`."""

import gzip
import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
from machine import MIB, ROOT, most_resident

from mobilellm_pro.data.dataset_config import load_datasets_config
from mobilellm_pro.data.documents import read_documents
from mobilellm_pro.data.source import Document
from mobilellm_pro.data.special_tokens import EOS
from mobilellm_pro.data.text_parts import tokenize_part
from mobilellm_pro.data.tokenizer import SPLIT_PATTERN, Tokenizer, find_llama4_file

DATASETS_TOML = ROOT / "train_configs/debug/datasets.toml"


def tokenize(folder: Path, work: Path, repeats: int) -> list[str]:
    """MB/s of `prepare` (reading, tokenizing, writing) and of tiktoken alone, each the sum over two processes."""
    documents = [
        document
        for dataset in load_datasets_config(DATASETS_TOML).datasets
        for source in dataset.sources()
        for document in read_documents(dataset, source)
    ]
    files = []
    for part in range(2):  # one for each process, alike
        files.append(work / f"half_{part}.jsonl.gz")
        with gzip.open(files[-1], "wt", compresslevel=1) as file:
            for document in documents[part::2] * 2:
                file.write(json.dumps({"id": document.id, "text": document.text}) + "\n")
    lines = [
        "| tokenizer | time | tiktoken, published pattern MB/s | tiktoken, our pattern | prepare | prepare / each |",
        "|---|---|---|---|---|---|",
    ]
    for tokenizer in tokenizers():
        rows: list[tuple[str, list[float]]] = []
        for number in range(repeats):
            alone = [raw_speed(files, tokenizer, pattern) for pattern in (SPLIT_PATTERN, "")]
            rows.append(("wall", [*alone, prepare_speed(files, tokenizer, work / f"prepared_{number}")]))
        rows.append((f"core, best of {2 * repeats}", core_speeds(documents, tokenizer, work, 2 * repeats)))
        for name, (published, grouped, ours) in rows:
            ratios = f"{ours / published:.2f}, {ours / grouped:.2f}"
            lines.append(
                f"| {Path(tokenizer).stem} | {name} | {published:.2f} | {grouped:.2f} | {ours:.2f} | {ratios} |"
            )
    return lines


def tokenizers() -> list[str]:
    """The debug tokenizer, and the real one where `llama-models` is installed."""
    names = [str(ROOT / "tests/assets/debug_tokenizer.model")]
    try:
        find_llama4_file()
    except FileNotFoundError:
        return names
    return [*names, "llama4"]


def prepare_speed(files: list[Path], tokenizer: str, output: Path) -> float:
    """MB/s that `prepare` reports for the corpora, added up; from the first document to the last shard of each."""
    toml = output.with_suffix(".toml")
    tables = [f'[[dataset]]\nname = "half_{i}"\nsource = "{file}"\n' for i, file in enumerate(files)]
    toml.write_text("\n".join([f'tokenizer = "{tokenizer}"\noutput = "{output}"', *tables]))
    command = [sys.executable, "-m", "mobilellm_pro", "prepare", str(toml), "--overwrite", "--workers", str(len(files))]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return sum(float(speed) for speed in re.findall(r"\(([\d.]+) MB/s\)", done.stdout))


def raw_speed(files: list[Path], tokenizer: str, pattern: str) -> float:
    """MB/s of `encode_ordinary`, one process a file, all texts read before; added up."""
    with multiprocessing.get_context("spawn").Pool(len(files)) as pool:
        return sum(pool.starmap(_raw_speed, [(file, tokenizer, pattern) for file in files], chunksize=1))


def _raw_speed(file: Path, source: str, pattern: str) -> float:
    encode = raw_encoder(Tokenizer.load(source), pattern)
    with gzip.open(file, "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    begin = time.perf_counter()
    encode_all(encode, texts)
    return utf8_bytes(texts) / 1e6 / (time.perf_counter() - begin)


def raw_encoder(tokenizer: Tokenizer, pattern: str) -> Callable[[str], list[int]]:
    """`encode_ordinary` with a split pattern, "" for that of `Tokenizer`."""
    if not pattern:
        return tokenizer._encoding.encode_ordinary
    special = {EOS: tokenizer.eos_id}
    return tiktoken.Encoding(
        "p", pat_str=pattern, mergeable_ranks=tokenizer.ranks, special_tokens=special
    ).encode_ordinary


def encode_all(encode: Callable[[str], list[int]], texts: list[str]) -> None:
    """Encodes and forgets."""
    for text in texts:
        encode(text)


def utf8_bytes(texts: list[str]) -> int:
    """Of all texts together."""
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def core_speeds(documents: list[Document], source: str, work: Path, repeats: int, blocks: int = 6) -> list[float]:
    """MB a second of core time of tiktoken with either pattern and of a part of `prepare`, all in this process.

    They take turns on a few megabytes at a time, and of each turn the least of all repeats counts: what else runs on
    the machine then slows all of them alike.
    """
    tokenizer = Tokenizer.load(source)
    encoders = [raw_encoder(tokenizer, pattern) for pattern in (SPLIT_PATTERN, "")]
    least, size = np.full((blocks, 3), np.inf), 0
    for block in range(blocks):
        texts = [document.text for document in documents[block::blocks]]
        size += utf8_bytes(texts)
        file, toml = work / f"block_{block}.jsonl.gz", work / "block.toml"
        with gzip.open(file, "wt", compresslevel=1) as lines:
            lines.writelines(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
        toml.write_text(f'tokenizer = "{source}"\noutput = "{work}"\n[[dataset]]\nname = "b"\nsource = "{file}"\n')
        dataset, folder = load_datasets_config(toml).datasets[0], work / f"block_{block}"
        calls: list[Callable[[], object]] = [partial(encode_all, encode, texts) for encode in encoders]
        calls.append(
            partial(
                tokenize_part, dataset, dataset.sources(), folder, 0, tokenizer, threads=1, progress=lambda *_: None
            )
        )
        for _ in range(repeats):
            for number, call in enumerate(calls):
                begin = time.process_time()
                call()
                least[block, number] = min(least[block, number], time.process_time() - begin)
    return (size / 1e6 / least.sum(axis=0)).tolist()


def document(folder: Path, work: Path, repeats: int) -> list[str]:
    """`prepare` with a document of 200 MB between small ones."""
    text = work / "large.jsonl"
    paragraph = " ".join(f"word{i} of a long document." for i in range(2000)) + "\n"
    with text.open("w") as file:
        for number in range(3):
            body = paragraph * (200_000_000 // len(paragraph) + 1) if number == 1 else paragraph
            file.write(json.dumps({"id": str(number), "text": body}) + "\n")
    toml = work / "large.toml"
    toml.write_text(
        f'tokenizer = "{ROOT}/tests/assets/debug_tokenizer.model"\noutput = "{work}/large_tokens"\n'
        f'[[dataset]]\nname = "large"\nsource = "{text}"\nholdout = 0.0\n'
    )
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "mobilellm_pro", "prepare", str(toml)], cwd=ROOT)
    peak, _ = most_resident(child)
    assert child.returncode == 0
    seconds = time.perf_counter() - begin
    return [f"{peak / MIB:,.0f} MiB at most, parent and workers together, sampled every 50 ms; {seconds:.0f} s."]
