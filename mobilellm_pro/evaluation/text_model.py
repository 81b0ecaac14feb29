"""What an evaluation harness asks of a model, in token ids: likelihoods of endings, and continuations.

Two implementations: `StudentModel` for a student in memory (any checkpoint that `load_student` reads), and
`program_model.ProgramModel` for an exported ExecuTorch program.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm_pro.evaluation.token_tree import TokenTree, token_trees, tree_masks
from mobilellm_pro.model.generation import continue_tokens
from mobilellm_pro.model.kv_cache import KVCache
from mobilellm_pro.model.student import Student

LOGIT_ROWS = 256
"""Tokens whose logits exist at a time: with 202,048 ids in fp32, 207 MB."""

ENOUGH_TOKENS = 256
"""Of a tree on a CPU whose sequences have little in common: its products are fast by then."""

CHUNK_TOKENS = 2048
"""Of a sequence that is too long for a tree, at a time."""


class Ending(NamedTuple):
    """A sequence of which the last tokens are scored."""

    ids: list[int]
    num_scored: int
    """Less than the number of ids: the first id is given, never predicted."""


class Score(NamedTuple):
    """Of an ending."""

    log_likelihood: float
    """Natural logarithm, summed over its tokens."""

    is_greedy: bool
    """Whether each of its tokens is the most likely one after those before it."""


class Sampling(NamedTuple):
    """How a continuation is chosen."""

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    """0 takes the most likely token."""

    top_p: float = 1.0


class TextModel(Protocol):
    """A model as evaluations use it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence that it was made for."""
        ...

    def scores(self, endings: Sequence[Ending]) -> Iterator[tuple[int, Score]]:
        """(number of an ending, its score), in an order of the model's own."""
        ...

    def continuations(
        self, prompts: Sequence[list[int]], sampling: Sampling, ends: Callable[[list[int]], bool]
    ) -> Iterator[tuple[int, list[int]]]:
        """(number of a prompt, new ids), in an order of the model's own.

        Args:
            prompts: none empty.
            sampling: of all of them.
            ends: whether a continuation, given whole so far, may stop.
        """
        ...


class StudentModel:
    """A student in memory.

    Attributes:
        student: itself.
        max_tokens: longest sequence that it was trained on.
    """

    def __init__(
        self, student: Student, max_tokens: int, *, tree_tokens: int = 2048, batch: int = 8, seed: int = 1234
    ) -> None:
        """
        Args:
            student: in evaluation mode, on its device.
            max_tokens: longest sequence that it was trained on.
            tree_tokens: of many sequences at a time; longer ones go alone, in chunks with a KV cache.
            batch: prompts of equal length that are continued at a time.
            seed: of sampling.
        """
        self.student, self.max_tokens = student, max_tokens
        self._tree_tokens, self._batch = tree_tokens, batch
        self._generator = torch.Generator(self._device).manual_seed(seed)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.student.model_args.vocab_size

    @property
    def _device(self) -> torch.device:
        return self.student.norm.weight.device

    def scores(self, endings: Sequence[Ending]) -> Iterator[tuple[int, Score]]:
        """As `TextModel`: endings that begin alike are computed together."""
        inputs = [ending.ids[:-1] for ending in endings]
        long = [number for number, ids in enumerate(inputs) if len(ids) > self._tree_tokens]
        short = [number for number, ids in enumerate(inputs) if len(ids) <= self._tree_tokens]
        for number in long:
            yield number, self._long_score(endings[number])
        counts = [ending.num_scored for ending in endings]
        enough = ENOUGH_TOKENS if self._device.type == "cpu" else None
        for tree in token_trees(inputs, counts, self._tree_tokens, short, enough):
            yield from self._tree_scores(tree, endings)

    @torch.no_grad()
    def _tree_scores(self, tree: TokenTree, endings: Sequence[Ending]) -> Iterator[tuple[int, Score]]:
        depths, ends = (torch.tensor(numbers, device=self._device) for numbers in (tree.depths, tree.ends))
        places = torch.tensor([place for path in tree.paths.values() for place in path], device=self._device)
        targets = torch.tensor(
            [token for number in tree.paths for token in endings[number].ids[-endings[number].num_scored :]],
            device=self._device,
        )
        log_likelihoods, greedy = self.student(
            torch.tensor([tree.tokens], device=self._device),
            positions=depths.unsqueeze(0),
            masks=tree_masks(depths, ends, self.student.spans()),
            head=lambda hidden, weight: _token_scores(hidden[0], weight, places, targets),
        )
        counts = [endings[number].num_scored for number in tree.paths]
        for number, nats, hits in zip(tree.paths, log_likelihoods.split(counts), greedy.split(counts), strict=True):
            yield number, Score(float(nats.sum()), bool(hits.all()))

    @torch.no_grad()
    def _long_score(self, ending: Ending) -> Score:
        ids = torch.tensor(ending.ids, device=self._device)
        first_scored = len(ids) - ending.num_scored
        cache = KVCache(len(ids), self.student.cache_dtype)
        log_likelihood, is_greedy = 0.0, True
        for first in range(0, len(ids) - 1, CHUNK_TOKENS):
            last = min(first + CHUNK_TOKENS, len(ids) - 1)
            places = torch.arange(max(first_scored - 1, first), last, device=self._device)

            def head(hidden: Tensor, weight: Tensor, places: Tensor = places, first: int = first) -> tuple:
                return _token_scores(hidden[0], weight, places - first, ids[places + 1])

            nats, hits = self.student(ids[first:last].unsqueeze(0), cache=cache, head=head)
            log_likelihood, is_greedy = log_likelihood + float(nats.sum()), is_greedy and bool(hits.all())
        return Score(log_likelihood, is_greedy)

    def continuations(
        self, prompts: Sequence[list[int]], sampling: Sampling, ends: Callable[[list[int]], bool]
    ) -> Iterator[tuple[int, list[int]]]:
        """As `TextModel`: prompts of equal length go through the model together, the longest first."""
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(number)
        for length in sorted(by_length, reverse=True):
            numbers = by_length[length]
            for first in range(0, len(numbers), self._batch):
                together = numbers[first : first + self._batch]
                new = continue_tokens(
                    self.student,
                    torch.tensor([prompts[number] for number in together], device=self._device),
                    sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    stop_ids=sampling.stop_ids,
                    generator=self._generator,
                    ends=ends,
                )
                yield from zip(together, new.tolist(), strict=True)


def _token_scores(hidden: Tensor, weight: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log likelihoods of tokens, and whether they are the most likely ones.

    Args:
        hidden: [N, D] last hidden states.
        weight: [V, D] of the head.
        places: [T] token of the N after which each target comes; several targets may come after one.
        targets: [T] ids.

    Returns:
        fp32 [T], bool [T].
    """
    rows, row_of = places.unique(return_inverse=True)
    log_likelihoods = torch.empty(len(targets), device=hidden.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for first in range(0, len(rows), LOGIT_ROWS):
        logits = F.linear(hidden[rows[first : first + LOGIT_ROWS]], weight).float()
        here = ((row_of >= first) & (row_of < first + LOGIT_ROWS)).nonzero().squeeze(1)
        row, target = row_of[here] - first, targets[here]
        log_likelihoods[here] = logits[row, target] - logits.logsumexp(-1)[row]
        greedy[here] = logits.argmax(-1)[row] == target
    return log_likelihoods, greedy
