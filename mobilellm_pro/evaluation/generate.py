"""The `generate` verb: a continuation of a prompt from a checkpoint of either format."""

import torch

from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.student_checkpoint import load_student
from mobilellm_pro.model.generation import continue_tokens


def generate(
    checkpoint: str,
    *,
    prompt: str = "",
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    tokenizer: str | None = None,
) -> str:
    """Print a prompt and its continuation by a student, and return the continuation.

    Args:
        checkpoint: a run folder, one `step-N` folder, or a Hugging Face folder.
        prompt: text to continue; bos is put before it.
        max_new_tokens: stops there, or at the end of the text.
        temperature: 0 is greedy, else samples.
        top_p: share of probability to sample from.
        seed: of the sampling.
        tokenizer: tiktoken file or "llama4"; default the checkpoint's own.

    Raises:
        ValueError: the checkpoint is not a student's, or does not fit its configuration.
    """
    loaded = load_student(checkpoint, "float32")
    text = Tokenizer.load(tokenizer or loaded.tokenizer)
    ids = torch.tensor([text.encode(prompt, bos=True)], device=loaded.device)
    new = continue_tokens(
        loaded.model,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=text.stop_ids,
        generator=torch.Generator(loaded.device).manual_seed(seed),
    )
    continuation = text.decode([i for i in new[0].tolist() if i not in text.stop_ids])
    print(prompt + continuation)
    return continuation
