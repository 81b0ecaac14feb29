"""Names of the special tokens that follow the ranks of a Llama 4 style tokenizer file.

A tiktoken file holds only ordinary tokens; the special ones are appended after the last rank, in the order given here.
The real file (200,000 ranks) has 2,048 of them. A smaller file, such as the debug tokenizer of the tests, has the first
19: every name that training needs, at the same offset from the last rank as in the real vocabulary, so that code which
works on one works on the other.
"""

from itertools import chain

LLAMA4_RANKS = 200_000
LLAMA4_SPECIALS = 2_048

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
PAD = "<|finetune_right_pad|>"
HEADER_START = "<|header_start|>"
HEADER_END = "<|header_end|>"
EOM = "<|eom|>"
EOT = "<|eot|>"
STOPS = (EOS, EOT, EOM)


def _reserved(group: str, start: int, stop: int) -> list[str]:
    """Placeholders of one group, numbered start .. stop - 1."""
    prefix = f"{group}_" if group else ""
    return [f"<|{prefix}reserved_special_token_{number}|>" for number in range(start, stop)]


def _named(words: str) -> list[str]:
    """`"eom eot"` -> `["<|eom|>", "<|eot|>"]`."""
    return [f"<|{word}|>" for word in words.split()]


# Everything up to the padding token: the part that a small tokenizer has too.
_HEAD = list(
    chain(
        _named("begin_of_text end_of_text fim_prefix fim_middle fim_suffix header_start header_end eom eot step"),
        _reserved("text_post_train", 0, 6),
        _named("python_start python_end finetune_right_pad"),
    )
)

# The rest of the real vocabulary. Numbers 6 and 7 of the text group do not exist in the published tokenizer either.
_TAIL = list(
    chain(
        _reserved("text_post_train", 8, 69),
        _named("image_start image_end"),
        _reserved("vision", 0, 2),
        _named("tile_x_separator tile_y_separator"),
        _reserved("vision", 2, 6),
        _named("image"),
        _reserved("vision", 6, 7),
        _named("patch"),
        _reserved("vision", 7, 1048),
        _reserved("reasoning", 0, 8),
        _named("reasoning_thinking_start reasoning_thinking_end"),
    )
)


def special_names(num_ranks: int) -> list[str]:
    """Special tokens in the order of their ids; the first one gets id `num_ranks`.

    Args:
        num_ranks: ordinary tokens in the tokenizer file.

    Returns:
        2,048 names for the real file of 200,000 ranks, else the 19 names up to the padding token.
    """
    if num_ranks != LLAMA4_RANKS:
        return list(_HEAD)
    names = _HEAD + _TAIL
    return names + _reserved("", 0, LLAMA4_SPECIALS - len(names))
