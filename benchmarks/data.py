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
document  most resident memory of `prepare` and its workers (pages that they share count once) while a document of 200
          MB is among the input
open      a corpus of 20 million documents (an index, and a .bin without content): seconds and memory to open it, all of
          it and the long documents only

Times are ratios within one run; every loader reads the same corpora.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from data_prepare import document, tokenize
from machine import ROOT, describe, in_folder, section_parser, write_sections

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.data.hugging_face_tokenizer import write_hugging_face_tokenizer
from mobilellm_pro.data.manifest import Manifest, ShardRecord, write_manifest
from mobilellm_pro.data.mixture import Mixture
from mobilellm_pro.data.packing import CorpusStream
from mobilellm_pro.data.shard_index import write_index
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.training.loader import MixtureLoader

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
        for row in mixed:
            held.append(row["input_ids"])
            count += len(held[-1])
            while count >= wanted:
                tokens = np.concatenate(held)
                rows = torch.from_numpy(tokens[:wanted].astype(np.int64)).view(-1, seq_len + 1)
                held, count = [tokens[wanted:]], count - wanted
                yield rows[:, :-1]


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
    parser = section_parser(__doc__, SECTIONS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=Path, default=ROOT / "outputs/debug/tokens", help="prepared debug corpora")
    arguments = parser.parse_args()
    packages = ["torch", "torchtitan", "torchdata", "datasets", "tiktoken", "numpy"]
    sections = {
        name: partial(in_folder, partial(SECTIONS[name], arguments.tokens, repeats=arguments.repeats))
        for name in arguments.only
    }
    write_sections(["# The data engine", "", *describe(packages)], sections, arguments.write)


if __name__ == "__main__":
    main()
