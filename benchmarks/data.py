"""The data engine against its promises and against other loaders, in one run.

    bash launch/quickstart.sh                                  # or any prepared corpora: makes text and tokens
    python benchmarks/data.py --write benchmarks/results/data_<hardware>_<yyyymm>.md
    python benchmarks/data.py --only loader --repeats 5

order     one hash of the token stream of 200 global steps, for 1, 2, 3, 4 and 8 ranks, with 0 and 2 workers each, and
          with new loaders from the saved states after every 7th step
loader    tokens a second of core time (all threads of the process): ours; torchtitan's text loader, which tokenizes as
          it goes (all corpora one after another); `datasets` streaming and interleaving parquet files whose tokens were
          made ahead. `datasets` draws documents and ours rows, so shares of tokens are made equal: once those of
          WEIGHTS, once those that follow when WEIGHTS are shares of documents, which are then longer
tokenize  `prepare` against tiktoken alone on the same text, in turns: two processes each, by the clock; and one process
          in core time. tiktoken runs with the split pattern as published and with the equal one that `Tokenizer` has
document  most resident memory of `prepare` and its workers while a document of 200 MB is among the input
open      a corpus of 20 million documents (an index, and a .bin without content): seconds and memory to open it, all of
          it and the long documents only

Times are ratios within one run; every loader reads the same corpora.
"""

import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
from machine import describe

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.data.dataset_config import load_datasets_config
from mobilellm_pro.data.documents import Document, read_documents
from mobilellm_pro.data.hugging_face_tokenizer import write_hugging_face_tokenizer
from mobilellm_pro.data.manifest import Manifest, ShardRecord, write_manifest
from mobilellm_pro.data.mixture import Mixture
from mobilellm_pro.data.packing import CorpusStream
from mobilellm_pro.data.shard_index import write_index
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.special_tokens import EOS
from mobilellm_pro.data.text_parts import tokenize_part
from mobilellm_pro.data.tokenizer import SPLIT_PATTERN, Tokenizer, find_llama4_file
from mobilellm_pro.training.loader import MixtureLoader

ROOT = Path(__file__).resolve().parents[1]
DATASETS_TOML = ROOT / "train_configs/debug/datasets.toml"
WEIGHTS = {"encyclopedia": 0.4, "code": 0.3, "questions": 0.15, "mathematics": 0.1, "manuals": 0.05}


def mixture(folder: Path, seq_len: int, weights: dict[str, float] = WEIGHTS) -> Mixture:
    """The debug corpora with unequal shares of the tokens."""
    streams = [CorpusStream(Corpus.open(folder / name), seq_len=seq_len, seed=1) for name in weights]
    return Mixture(streams, list(weights.values()), seed=1, renormalize=True)


# order


def order(folder: Path, work: Path, repeats: int) -> list[str]:
    """Rows of a table: one hash a layout."""
    lines = ["| ranks | workers | new loader every | sha256 of 200 steps |", "|---|---|---|---|"]
    hashes = set()
    for ranks in (1, 2, 3, 4, 8):
        for workers in (0, 2):
            for restart in (None, 7):
                digest = order_hash(mixture(folder, 256), ranks, workers, restart)
                hashes.add(digest)
                lines.append(f"| {ranks} | {workers} | {f'{restart} steps' if restart else '–'} | {digest[:16]} |")
    assert len(hashes) == 1, "the order depends on the layout"
    return lines


def order_hash(rows: Mixture, ranks: int, workers: int, restart: int | None, steps: int = 200) -> str:
    """sha256 of inputs, labels and document ids of all global steps of 24 rows, rank after rank."""
    digest = hashlib.sha256()
    done = 0
    states: list[dict | None] = [None] * ranks
    while done < steps:
        loaders = [MixtureLoader(rows, 24 // ranks, rank, ranks, num_workers=workers) for rank in range(ranks)]
        for loader, state in zip(loaders, states, strict=True):
            if state is not None:
                loader.load_state_dict(state)
        iterators = [iter(loader) for loader in loaders]
        for _ in range(min(restart or steps, steps - done)):
            for iterator in iterators:
                inputs, labels = next(iterator)
                for row in zip(inputs["input"], labels, inputs["document_ids"], strict=True):
                    for tensor in row:
                        digest.update(tensor.numpy().tobytes())
            done += 1
        states = [loader.state_dict() for loader in loaders]
    return digest.hexdigest()


# loader


def loader(folder: Path, work: Path, repeats: int) -> list[str]:
    """Tokens a second of core time of each loader, interleaved, at two lengths."""
    head = "| tokens a row | tokens a document | loader | tokens/s of core time (least, most) | ours is faster by |"
    lines = [head, "|---|---|---|---|---|"]
    prepare_peers(folder, work)
    means = {name: corpus.num_tokens / corpus.num_documents for name, corpus in opened(folder).items()}
    for documents in (
        {name: weight / means[name] for name, weight in WEIGHTS.items()},  # so many that WEIGHTS are shares of tokens
        WEIGHTS,
    ):
        shares = {name: weight / sum(documents.values()) for name, weight in documents.items()}
        tokens = {name: share * means[name] for name, share in shares.items()}
        makers: dict[str, Callable[..., Iterator[torch.Tensor]]] = {
            "ours": partial(ours, weights=tokens),
            "torchtitan text loader": torchtitan_text,
            "datasets interleave, tokenized": partial(interleave, shares=shares),
        }
        for seq_len in (2048, 131072):
            speeds: dict[str, list[float]] = {name: [] for name in makers}
            for _ in range(repeats):
                for name, make in makers.items():
                    # Ours would be over before the clock has moved.
                    count = 2**26 if name == "ours" else 2**20 if "torchtitan" in name else 2**22
                    speeds[name].append(core_speed(partial(make, folder, work, seq_len), seq_len, count))
            best = statistics.median(speeds["ours"])
            for name, values in speeds.items():
                middle = statistics.median(values)
                spread = f"{middle:,.0f} ({min(values):,.0f}, {max(values):,.0f})"
                size = f"{sum(tokens.values()):,.0f}"
                lines.append(f"| {seq_len:,} | {size} | {name} | {spread} | {best / middle:.1f} × |")
    return lines


def core_speed(make: Callable[[], Iterator[torch.Tensor]], seq_len: int, tokens: int) -> float:
    """Tokens a second of core time, after a first batch that pays for opening."""
    rows = make()
    next(rows)
    begin, seen = time.process_time(), 0
    while seen < tokens:
        seen += next(rows).numel()
    return seen / (time.process_time() - begin)


def batch_rows(seq_len: int) -> int:
    """Rows of a micro-batch: 32,768 tokens, or one row."""
    return max(1, 2**15 // seq_len)


def ours(folder: Path, work: Path, seq_len: int, *, weights: dict[str, float] = WEIGHTS) -> Iterator[torch.Tensor]:
    """The loader of this project, as the trainer drives it, without workers."""
    for inputs, _ in MixtureLoader(mixture(folder, seq_len, weights), batch_rows(seq_len), 0, 1):
        yield inputs["input"]


def prepare_peers(folder: Path, work: Path) -> None:
    """The same corpora as torchtitan and `datasets` want them: text as JSON lines, tokens as parquet, a tokenizer."""
    from datasets import Dataset

    os.environ["HF_HOME"] = str(work / "hugging_face")
    tokenizer = Tokenizer.load(str(ROOT / "tests/assets/debug_tokenizer.model"))
    write_hugging_face_tokenizer(tokenizer, work / "tokenizer")
    (work / "text").mkdir()
    for name in WEIGHTS:
        corpus = Corpus.open(folder / name)
        lengths = corpus.lengths(0, corpus.num_documents).tolist()
        documents = [corpus.tokens(i, 0, length) for i, length in enumerate(lengths)]
        Dataset.from_dict({"input_ids": documents}).to_parquet(work / f"{name}.parquet")
        with (work / "text" / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": tokenizer.decode(ids[1:-1])}) + "\n" for ids in documents)


def torchtitan_text(folder: Path, work: Path, seq_len: int) -> Iterator[torch.Tensor]:
    """`torchtitan.hf_datasets.text_datasets` on local JSON lines with the Hugging Face form of our tokenizer."""
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from torchtitan.hf_datasets.text_datasets import build_text_dataloader

    config = JobConfig()
    config.training.dataset, config.training.dataset_path = "c4_test", str(work / "text")
    config.training.local_batch_size, config.training.seq_len = batch_rows(seq_len), seq_len
    for inputs, _ in build_text_dataloader(1, 0, HuggingFaceTokenizer(str(work / "tokenizer")), config):
        yield inputs["input"]


def opened(folder: Path) -> dict[str, Corpus]:
    """The debug corpora by name."""
    return {name: Corpus.open(folder / name) for name in WEIGHTS}


def interleave(folder: Path, work: Path, seq_len: int, *, shares: dict[str, float]) -> Iterator[torch.Tensor]:
    """`datasets` streaming parquet of token ids, its documents drawn by `shares` and packed, as numpy, its fastest."""
    from datasets import interleave_datasets, load_dataset

    files = [str(work / f"{name}.parquet") for name in WEIGHTS]
    streams = [load_dataset("parquet", data_files=f, split="train", streaming=True).with_format("numpy") for f in files]
    mixed = interleave_datasets(streams, probabilities=list(shares.values()), seed=1, stopping_strategy="all_exhausted")
    held: list[np.ndarray] = []
    count, wanted = 0, batch_rows(seq_len) * (seq_len + 1)
    while True:
        for document in mixed:
            held.append(document["input_ids"])
            count += len(held[-1])
            while count >= wanted:
                tokens = np.concatenate(held)
                rows = torch.from_numpy(tokens[:wanted].astype(np.int64)).view(-1, seq_len + 1)
                held, count = [tokens[wanted:]], count - wanted
                yield rows[:, :-1]


# tokenize


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


# document


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
    peak = 0
    while child.poll() is None:
        peak = max(peak, resident_bytes(child.pid))
        time.sleep(0.05)
    assert child.returncode == 0
    seconds = time.perf_counter() - begin
    return [f"{peak / 2**20:,.0f} MiB at most, parent and workers together, sampled every 50 ms; {seconds:.0f} s."]


def resident_bytes(pid: int) -> int:
    """Of a process and all below it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in below)


# open


def open_corpus(folder: Path, work: Path, repeats: int) -> list[str]:
    """20 million documents of 50 to 999 tokens."""
    corpus = work / "twenty_million"
    corpus.mkdir()
    lengths = np.random.default_rng(0).integers(50, 1000, 20_000_000, dtype=np.int32)
    write_index(corpus / "train-00000.idx", lengths)
    tokens = int(lengths.sum())
    with (corpus / "train-00000.bin").open("wb") as file:
        file.truncate(4 * tokens)
    record = ShardRecord("train-00000", len(lengths), tokens, 1, "", "")
    write_manifest(
        corpus, Manifest("t", "f", 10, {}, [], {"train": [record], "valid": []}, {"train": 1, "valid": 0}, {})
    )
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mobilellm_pro.data.shards import Corpus\n"
        "from mobilellm_pro.data.packing import CorpusStream\n"
        "from mobilellm_pro.data.mixture import Mixture, batch\n"
        "def status(field):\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before, t0 = status('VmRSS'), time.perf_counter()\n"
        "corpus = Corpus.open(sys.argv[1])\n"
        "t1 = time.perf_counter()\n"
        "stream = CorpusStream(corpus, seq_len=2048, seed=1, min_document_tokens=int(sys.argv[2]) or None)\n"
        "mixture = Mixture([stream], [1.0], seed=1)\n"
        "batch(mixture, 500_000 * 680, 1)\n"
        "t2 = time.perf_counter()\n"
        "batch(mixture, 500_001 * 680, 16)\n"
        "t3 = time.perf_counter()\n"
        "grown = status('VmHWM') - before\n"
        "print(f'| {sys.argv[2]} | {t1 - t0:.2f} | {t2 - t1:.2f} | {1000 * (t3 - t2):.0f} | {grown:.0f} |')"
    )
    lines = [
        "| least tokens | open s | first row of step 500,000 s | next 16 rows ms | growth of resident peak MiB |",
        "|---|---|---|---|---|",
    ]
    for least in [0] * repeats + [990] * repeats:
        command = [sys.executable, "-c", script, str(corpus), str(least)]
        lines.append(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip())
    return lines


SECTIONS = {"order": order, "loader": loader, "tokenize": tokenize, "document": document, "open": open_corpus}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=Path, default=ROOT / "outputs/debug/tokens", help="prepared debug corpora")
    parser.add_argument("--write", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    lines = ["# The data engine", "", *describe(["torch", "torchtitan", "torchdata", "datasets", "tiktoken", "numpy"])]
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as work:
            lines += ["", f"## {name}", "", *SECTIONS[name](arguments.tokens, Path(work), arguments.repeats)]
        print("\n".join(lines[-12:]), flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
