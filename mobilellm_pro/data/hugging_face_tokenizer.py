"""Writes a `Tokenizer` as the folder files that `transformers.AutoTokenizer.from_pretrained` reads.

The JSON is built here from the ranks, without importing transformers or tokenizers: a Hugging Face byte-pair model
wants an ordered list of merges where tiktoken's file has only ranks. Tiktoken always merges the neighbouring pair whose
union has the lowest rank, so the merges are, in the order of the ranks, every split of a token into two tokens.
`ignore_merges` reproduces tiktoken's other rule: a piece that is a token by itself is taken whole.

With `add_special_tokens=False` the ids equal `Tokenizer.encode(text)`, with the default they equal `encode(text,
bos=True)`, for text without special names and shorter than `tokenizer.MAX_CHUNK_CHARS`.

    write_hugging_face_tokenizer(Tokenizer.load("llama4"), "outputs/model")      # 28 MB, some seconds
"""

import json
from pathlib import Path
from typing import Any

from mobilellm_pro.data.special_tokens import BOS, EOS, PAD
from mobilellm_pro.data.tokenizer import SPLIT_PATTERN, Tokenizer


def write_hugging_face_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, max_tokens: int = 131_072) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into `folder` (created if
    missing).

    Args:
        tokenizer: the tokenizer to write.
        folder: usually that of an exported model.
        max_tokens: context length that the configuration states (`model_max_length`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_tokens,
    }
    _write(folder / "tokenizer.json", _tokenizer_json(tokenizer), indent=None)
    _write(folder / "tokenizer_config.json", config, indent=2)
    _write(folder / "special_tokens_map.json", names, indent=2)


def _write(path: Path, content: dict[str, Any], indent: int | None) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The `tokenizers` library's serialised form: split, byte-level alphabet, merges, then bos in front."""
    spell = _byte_alphabet()
    spelled = {token: "".join(spell[byte] for byte in token) for token in tokenizer.ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    bos, text = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(name, token_id) for name, token_id in tokenizer.special_ids.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"SpecialToken": {"id": BOS, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.bos_id], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in tokenizer.ranks.items()},
            "merges": [[spelled[left], spelled[right]] for left, right in _merges(tokenizer.ranks)],
        },
    }


def _added_token(name: str, token_id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name, **flags, "special": True}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens whose union is a token, in the order of the union's rank, then of the parts' ranks."""
    pairs: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        pairs += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs


def _byte_alphabet() -> list[str]:
    """256 printable characters, one per byte: printable Latin-1 stands for itself, the rest moves behind U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {byte: chr(256 + position) for position, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]
