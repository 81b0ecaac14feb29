"""Text continuation with a KV cache.

A prompt goes in in chunks: the memory beside the cache is that of a chunk, however long the prompt is.

Shapes: B rows of equal length, S prompt tokens, N new tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm_pro.model.kv_cache import KVCache
from mobilellm_pro.model.student import Student
from mobilellm_pro.quantization.scheme import CacheDtype


@torch.no_grad()
def continue_tokens(
    model: Student,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: tuple[int, ...] = (),
    ends: Callable[[list[int]], bool] | None = None,
    generator: torch.Generator | None = None,
    prefill_tokens: int = 2048,
    cache_dtype: CacheDtype | None = None,
) -> Tensor:
    """Appends tokens to a prompt.

    Args:
        model: the student.
        prompt: [B, S] ids, S >= 1.
        max_new_tokens: N at most.
        temperature: 0 takes the most likely token, else samples from softmax(logits / temperature).
        top_p: samples among the fewest tokens whose probabilities sum to at least top_p.
        stop_ids: ends when every row has produced one of them; a row goes on repeating its own.
        ends: whether a row may also stop with the new ids that it has so far; asked after each token.
        generator: source of randomness.
        prefill_tokens: of the prompt at a time.
        cache_dtype: of the KV cache; default: what the student is trained for.

    Returns:
        [B, <= N] new ids.

    Raises:
        ValueError: an empty prompt or an empty chunk.
    """
    if prompt.shape[1] == 0:
        raise ValueError("the prompt has no tokens; expected at least one (bos alone will do)")
    if prefill_tokens < 1:
        raise ValueError(f"prefill_tokens = {prefill_tokens}; expected at least 1")
    if max_new_tokens < 1:
        return prompt[:, :0]
    cache = KVCache(prompt.shape[1] + max_new_tokens, cache_dtype or model.cache_dtype)
    *chunks, tokens = prompt.split(prefill_tokens, dim=1)
    for chunk in chunks:
        model(chunk, cache=cache, head=_no_logits)
    produced: list[Tensor] = []
    rows: list[list[int]] = [[] for _ in range(prompt.shape[0])]
    finished = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    stops = torch.tensor(stop_ids, device=prompt.device)
    for _ in range(max_new_tokens):
        logits = model(tokens, cache=cache, head=_last_logits)
        chosen = _choose(logits.float(), temperature, top_p, generator)
        if produced:
            chosen = torch.where(finished, produced[-1], chosen)
        produced.append(chosen)
        finished |= torch.isin(chosen, stops)
        if ends is not None:
            for row, token in zip(rows, chosen.tolist(), strict=True):
                row.append(token)
            finished |= torch.tensor([ends(row) for row in rows], device=prompt.device)
        if bool(finished.all()):
            break
        tokens = chosen.unsqueeze(1)
    return torch.stack(produced, dim=1)


def _last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden[:, -1], weight)


def _no_logits(hidden: Tensor, weight: Tensor) -> None:
    """Only the last token of a prompt says anything about the next one."""


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """[B, V] -> [B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, ids = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    # The token that crosses top_p still belongs to the nucleus.
    probabilities[probabilities.cumsum(dim=-1) - probabilities >= top_p] = 0
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
