"""RULER's needle tasks as lm-eval has them, run from its source text.

Importing that module asks for packages that are not needed here and downloads a sentence splitter, so its functions are
taken out of the file, with words and a splitter of our own.
"""

import ast
import random
import re
import uuid
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from mobilellm_pro.data.tokenizer import Tokenizer

WORDS = ["lazy-river", "green-table", "odd-stone", "tall-garden", "red-signal", "calm-engine"]


def ruler(split_sentences: Callable[[str], list[str]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Names of lm-eval's `ruler` folder -> what they are; skips the test where lm-eval is not installed."""
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        pytest.skip("lm-eval is not installed (pip install mobilellm-pro[eval])")
    folder = Path(found.origin).parent / "tasks/ruler"
    names: dict[str, Any] = {
        "random": random, "re": re, "uuid": uuid, "np": np, "cache": cache, "lru_cache": lru_cache, "Literal": Literal,
        "WORDS": WORDS, "sent_tokenize": split_sentences, "tqdm": lambda items, **options: items, "datasets": None,
    }  # fmt: skip
    wanted_assignments = {"NEEDLE", "DEPTHS", "RANDOM_SEED", "TEMPLATE"}
    for file in ("prepare_niah.py", "niah_utils.py", "common_utils.py"):
        body = [
            node
            for node in ast.parse((folder / file).read_text()).body
            if (isinstance(node, ast.FunctionDef) and not node.name.startswith(("niah_", "get_tok", "download")))
            or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in wanted_assignments)
        ]
        annotations = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
        module = ast.fix_missing_locations(ast.Module([annotations, *body], []))
        exec(compile(module, file, "exec"), names)
    names["TOKENIZER"] = lambda text: SimpleNamespace(input_ids=tokenizer.encode(text))
    return names
