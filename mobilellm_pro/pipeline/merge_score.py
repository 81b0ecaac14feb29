"""What merged models are scored by: bits per byte, or KL from a teacher, of each domain, quickly for many candidates.

The documents are those that `held-out` reads, but packed: rows of several documents, each invisible to the others and
numbered from 0, give what documents read alone give, in a fraction of the calls. Tokens, masks and, for KL, the
teacher's hidden states are made once for all candidates.

A score of another kind, as a mean over benchmarks, is one more function from a model to a number for each domain.

Shapes: R rows, S tokens of a row, E teacher width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mobilellm_pro.config import JobConfig
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.held_out import held_out_documents
from mobilellm_pro.losses import DistillationLoss, linear_distillation
from mobilellm_pro.model.attention_mask import PackedRows
from mobilellm_pro.model.checkpoint import empty_model, load_model
from mobilellm_pro.model.student import Student
from mobilellm_pro.model.teacher import Teacher
from mobilellm_pro.pipeline.merge_inputs import text_settings
from mobilellm_pro.pipeline.merge_plan import MergePlan

BATCH_TOKENS = 8192
"""About so many tokens go through the model at a time, at least a row."""
IGNORED = -100


@dataclass
class Batch:
    """Packed rows of one domain."""

    tokens: Tensor
    """[R, S] ids."""

    labels: Tensor
    """[R, S] the next id of the same document, IGNORED where there is none."""

    rows: PackedRows
    teacher_hidden: Tensor | None = None
    """[R, S, E], on the CPU."""


@dataclass
class DomainText:
    """The text of one domain that models are scored on."""

    batches: list[Batch]
    num_tokens: int
    """That are predicted."""

    num_bytes: int
    """Of their text."""


def read_text(plan: MergePlan, part: str, tokenizer: Tokenizer, device: str) -> dict[str, DomainText]:
    """The packed documents of each domain.

    Args:
        plan: the domains, how much of each, and the longest document.
        part: "dev" or "valid".
        tokenizer: of the corpora.
        device: where the models run.
    """
    documents: dict[str, list[np.ndarray]] = {domain.name: [] for domain in plan.domains}
    for name, ids in held_out_documents(text_settings(plan, part), tokenizer):
        documents[name].append(ids.astype(np.int64))
    text = {}
    for name, own in documents.items():
        row_tokens = max(len(ids) for ids in own) - 1
        row_tokens = min(plan.job.validation.seq_len, -(-row_tokens // 128) * 128)
        num_bytes = sum(int(tokenizer.token_bytes[ids[1:]].sum()) for ids in own)
        batches = list(_batches(pack(own, row_tokens), device))
        text[name] = DomainText(batches, sum(len(ids) - 1 for ids in own), num_bytes)
    return text


def pack(documents: Iterable[np.ndarray], row_tokens: int) -> np.ndarray:
    """Rows of whole documents, in their order: a document that does not fit begins the next row.

    Args:
        documents: ids [n], 2 <= n <= row_tokens + 1.
        row_tokens: S.

    Returns:
        int64 [3, R, S]: ids, labels, and number of the document, which is one more for the empty end of a row.
    """
    rows: list[np.ndarray] = []
    filled = row_tokens
    for ids in documents:
        count = len(ids) - 1
        assert 1 <= count <= row_tokens
        if filled + count > row_tokens:
            rows.append(np.stack([np.zeros(row_tokens, int), np.full(row_tokens, IGNORED), np.zeros(row_tokens, int)]))
            filled = 0
        row, place = rows[-1], slice(filled, filled + count)
        row[0, place], row[1, place] = ids[:-1], ids[1:]
        row[2, filled + count :] = row[2, filled] + 1
        filled += count
    return np.stack(rows, axis=1)


def _batches(packed: np.ndarray, device: str) -> Iterable[Batch]:
    tokens, labels, documents = torch.from_numpy(packed).to(device)
    num_rows = max(1, BATCH_TOKENS // tokens.shape[1])
    for first in range(0, len(tokens), num_rows):
        place = slice(first, first + num_rows)
        yield Batch(tokens[place], labels[place], PackedRows(documents[place], "reset"))


class ScoringModel:
    """A model whose weights are replaced again and again.

    Args:
        config: of a run of its architecture.
        device: where it runs; in float32 on a CPU, else in bfloat16.
    """

    def __init__(self, config: JobConfig, device: str) -> None:
        model = empty_model(config, "float32" if device == "cpu" else "bfloat16", device)
        assert isinstance(model, Student)
        self.model = model

    def fill(self, read: Callable[[str], Tensor]) -> Student:
        """The model with other weights.

        Args:
            read: name of a parameter -> its tensor.
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(read(name))
        return self.model


def bits_per_byte(model: Student, text: dict[str, DomainText]) -> dict[str, float]:
    """Of each domain."""
    return {
        name: sum(float(_terms(model, batch, None).ce) for batch in domain.batches) / (math.log(2) * domain.num_bytes)
        for name, domain in text.items()
    }


class TeacherKL:
    """KL from a teacher to a model, in nats a token, of each domain; the teacher runs once, when it is first needed.

    Args:
        job: names the teacher.
        device: where it runs.
    """

    def __init__(self, job: JobConfig, device: str) -> None:
        self.job, self.device = job, device
        self._head: Tensor | None = None

    def __call__(self, model: Student, text: dict[str, DomainText]) -> dict[str, float]:
        """Of each domain; always the same text.

        Raises:
            FileNotFoundError, ValueError: the teacher's folder does not hold one.
        """
        if self._head is None:
            self._head = self._run(text)
        return {
            name: sum(float(_terms(model, batch, self._head).kl) for batch in domain.batches) / domain.num_tokens
            for name, domain in text.items()
        }

    def _run(self, text: dict[str, DomainText]) -> Tensor:
        """Gives the batches their hidden states and returns the head."""
        settings = self.job.teacher
        loaded = load_model(settings.path, settings.dtype, self.device)
        if not isinstance(loaded.model, Teacher):
            raise ValueError(f"teacher.path = {settings.path!r}: expected a Llama 4 text model")
        for domain in text.values():
            for batch in domain.batches:
                batch.teacher_hidden = _hidden(loaded.model, batch).cpu()
        return loaded.model.lm_head.weight.clone()


@torch.no_grad()
def _hidden(teacher: Teacher, batch: Batch) -> Tensor:
    masks = batch.rows.masks(teacher.spans())
    return teacher(batch.tokens, batch.rows.positions, masks, head=lambda hidden, weight: hidden)


@torch.no_grad()
def _terms(model: Student, batch: Batch, teacher_head: Tensor | None) -> DistillationLoss:
    """Sums over the tokens of a batch: cross entropy, and KL with a teacher."""

    def loss(hidden: Tensor, weight: Tensor) -> DistillationLoss:
        teacher_hidden = None
        if teacher_head is not None and batch.teacher_hidden is not None:
            teacher_hidden = batch.teacher_hidden.to(hidden.device)
        head = None if teacher_hidden is None else teacher_head
        kl_weight, ce_weight = (0.0, 1.0) if head is None else (1.0, 0.0)
        return linear_distillation(
            hidden, weight, teacher_hidden, head, batch.labels, kl_weight=kl_weight, ce_weight=ce_weight
        )

    return model(batch.tokens, batch.rows.positions, batch.rows.masks(model.spans()), head=loss)


def mean(by_domain: Sequence[float]) -> float:
    """Over domains, all alike."""
    return sum(by_domain) / len(by_domain)
