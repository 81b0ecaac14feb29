"""Bits per byte on held-out documents, each read alone: the `held-out` verb.

    mobilellm-pro held-out outputs/debug/2_context train_configs/debug/2_context.toml

A run's own validation reads packed rows under the run's own mask, truncation and choice of documents, so runs that
differ in those read different text. Here every model reads the same: documents of the job's corpora, or of the
clusters that it names, from their first token on, one at a time, in proportion to the weights, cut at the job's longest
row. They go through the model as a prompt does in generation, in chunks with a KV cache, so a long one needs little
memory.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.data.document_limits import DocumentLimits
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.needle_results import write_result
from mobilellm_pro.evaluation.student_checkpoint import load_student
from mobilellm_pro.losses import linear_distillation
from mobilellm_pro.model.kv_cache import KVCache
from mobilellm_pro.model.student import Student

CHUNK_TOKENS = 2048


def held_out(
    checkpoint: str,
    config: JobConfig,
    *,
    output: str | None = None,
    device: str | None = None,
    split: Literal["valid", "dev"] = "valid",
    quantize: Literal["cpu", "accelerator"] | None = None,
) -> dict[str, Any] | None:
    """Print a student's bits per byte on the held-out documents of a job's corpora, each document read alone.

    As many tokens are read as one rank validates on in the job (validation.steps x local_batch_size x seq_len), of each
    corpus in proportion to its weight; a document is cut at validation.seq_len. Masks, truncation and packing of the
    job do not matter, nor do those that the checkpoint was trained with. One process; other ranks do nothing.

    Args:
        checkpoint: a run folder, one `step-N` folder, or a Hugging Face folder.
        config: TOML file of a job.
        output: JSON file to write the result to.
        device: default cuda where there is one, else cpu.
        split: which held-out documents: those that reports are made of, or those that choices rest on (dev).
        quantize: round a student in full precision to the few bits of this scheme first, without training.

    Returns:
        bits_per_byte, ce (nats a token), tokens, documents, by_corpus (bits per byte), checkpoint and settings; None on
        ranks other than the first.

    Raises:
        FileNotFoundError: no such checkpoint, tokenizer or corpus.
        ValueError: the checkpoint is not a student's; the job validates nothing; the corpora lack that held-out part.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    settings = held_out_settings(config, split)
    loaded = load_student(checkpoint, device=device, quantize=quantize)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    if tokenizer.vocab_size != loaded.model.model_args.vocab_size:
        raise ValueError(
            f"{config.data.tokenizer}: {tokenizer.vocab_size} ids, {checkpoint} has "
            f"{loaded.model.model_args.vocab_size}; give a job of the same tokenizer"
        )
    rounded = {} if quantize is None else {"quantize": quantize}
    result = {"checkpoint": checkpoint, "settings": settings, **rounded, **_scores(loaded.model, tokenizer, settings)}
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(path.parent, result, path.name)
    print(f"{checkpoint}: {result['bits_per_byte']:.4f} bits/byte, {result['ce']:.4f} nats/token on "
          f"{result['tokens']:,} tokens of {result['documents']} documents")  # fmt: skip
    return result


def held_out_settings(config: JobConfig, split: str = "valid") -> dict[str, Any]:
    """What of a job decides which documents are read: equal settings give comparable numbers.

    `clusters` (of the corpora that are read in part) and `split` (where it is not "valid") stand there only if need be.

    Raises:
        ValueError: the job does not validate, so it does not say how much to read.
    """
    validation = config.validation
    if not validation.enable:
        raise ValueError(
            "validation.enable = false: the job does not say how much to read; set it, steps, "
            "local_batch_size and seq_len"
        )
    chosen = {dataset.name: dataset.clusters for dataset in config.data.datasets if dataset.clusters is not None}
    only_if_used = ({"clusters": chosen} if chosen else {}) | ({"split": split} if split != "valid" else {})
    return {
        "tokenizer": config.data.tokenizer,
        "corpora": [[dataset.name, dataset.path, dataset.weight] for dataset in config.data.datasets],
        "tokens": validation.steps * validation.local_batch_size * validation.seq_len,
        "longest_document_tokens": validation.seq_len,
        **only_if_used,
    }


def held_out_documents(settings: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """The documents that `held_out_settings` mean: (name of the corpus, ids [2 or more]), corpus after corpus.

    Raises:
        FileNotFoundError: no such corpus.
        ValueError: a corpus without that part or those clusters, or of another tokenizer.
    """
    weight_sum = sum(weight for _, _, weight in settings["corpora"])
    for name, path, weight in settings["corpora"]:
        corpus = Corpus.open(path, settings.get("split", "valid"), fingerprint=tokenizer.fingerprint)
        clusters = settings.get("clusters", {}).get(name)
        limits = DocumentLimits(clusters=None if clusters is None else tuple(clusters))
        budget = round(settings["tokens"] * weight / weight_sum)
        for ids in first_documents(corpus, limits, budget, settings["longest_document_tokens"]):
            yield name, ids


@torch.no_grad()
def document_nats(model: Student, ids: Tensor) -> float:
    """Cross entropy of tokens 1, 2, ... of a document given those before, summed, in nats.

    Args:
        model: the student.
        ids: [S] on its device, S >= 2.
    """
    cache, total = KVCache(len(ids), model.cache_dtype), 0.0
    for first in range(0, len(ids) - 1, CHUNK_TOKENS):
        last = min(first + CHUNK_TOKENS, len(ids) - 1)
        labels = ids[first + 1 : last + 1].unsqueeze(0)

        def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor = labels) -> Tensor:
            return linear_distillation(hidden, weight, labels=labels, kl_weight=0.0, ce_weight=1.0).ce

        total += float(model(ids[first:last].unsqueeze(0), cache=cache, head=cross_entropy))
    return total


def _scores(model: Student, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, Any]:
    device = model.embed_tokens.weight.device
    nats = {name: 0.0 for name, _, _ in settings["corpora"]}
    num_bytes = dict.fromkeys(nats, 0)
    num_tokens = num_documents = 0
    for name, ids in held_out_documents(settings, tokenizer):
        nats[name] += document_nats(model, torch.from_numpy(ids.astype(np.int64)).to(device))
        num_bytes[name] += int(tokenizer.token_bytes[ids[1:]].sum())
        num_tokens, num_documents = num_tokens + len(ids) - 1, num_documents + 1
    if not sum(num_bytes.values()):
        raise ValueError("no held-out document has any text; prepare the corpora with a larger holdout")
    bits = {name: nats[name] / (math.log(2) * num_bytes[name]) for name in nats if num_bytes[name]}
    total = sum(nats.values())
    return {
        "bits_per_byte": total / (math.log(2) * sum(num_bytes.values())),
        "ce": total / num_tokens,
        "tokens": num_tokens,
        "documents": num_documents,
        "by_corpus": bits,
    }


def first_documents(corpus: Corpus, limits: DocumentLimits, budget: int, longest: int) -> Iterator[np.ndarray]:
    """The first documents of a corpus, each cut at `longest` tokens, the last where the budget ends."""
    lengths = limits.lengths(corpus, 0, corpus.num_documents)
    for document, length in enumerate(lengths.tolist()):
        count = min(length, longest, budget)
        if budget < 2:
            return
        if count >= 2:  # there is nothing to predict in a single token
            yield np.asarray(corpus.tokens(document, 0, count))
            budget -= count
