"""Small prepared corpora for tests of everything that trains: text with a structure that a tiny model learns fast.

Each corpus has its own nouns and its own sentence pattern, so that a loss falls within tens of steps and a mixture is
visible in the tokens. Made through the real `prepare`, in this process, in well under a second.

    folders = make_corpora(tmp_path, names=("a", "b"))
    corpus = Corpus.open(folders["a"], "train")
"""

import json
import random
from pathlib import Path

from mobilellm_pro.data.prepare import prepare

DEBUG_TOKENIZER = Path(__file__).parents[1] / "assets" / "debug_tokenizer.model"
_NOUNS = "river stone garden window engine letter number market winter table bridge forest paper signal voice".split()
_VERBS = "finds keeps moves shows holds turns".split()


def make_corpora(
    folder: Path,
    names: tuple[str, ...] = ("a", "b"),
    *,
    documents: int = 150,
    sentences: int = 8,
    holdout: float = 0.1,
    dev: float = 0.0,
    shard_tokens: int = 5_000,
    seed: int = 0,
) -> dict[str, Path]:
    """Prepares one corpus per name below `folder` with the debug tokenizer (4,096 ids).

    Args:
        folder: gets `text/<name>.jsonl`, `datasets.toml` and `tokens/<name>/`.
        names: of the corpora.
        documents: of each corpus, both splits together.
        sentences: of the longest document; lengths vary from one sentence on, about 9 tokens each.
        holdout, dev: shares of documents in the splits "valid" and "dev".
        shard_tokens: small by default, so that a corpus has several shards.
        seed: equal arguments give equal files.

    Returns:
        name -> folder of the corpus, for `Corpus.open`.
    """
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        rng = random.Random(f"{seed}/{name}")
        lines = [
            json.dumps({"id": f"{name}/{i}", "text": _document(rng, number, rng.randint(1, sentences))})
            for i in range(documents)
        ]
        (text / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    prepare(write_toml(folder, names, holdout=holdout, dev=dev, shard_tokens=shard_tokens), workers=0)
    return {name: folder / "tokens" / name for name in names}


def write_toml(folder: Path, names: tuple[str, ...], **settings: object) -> Path:
    """Writes `<folder>/datasets.toml` for `<folder>/text/<name>.jsonl`; settings go into every `[[dataset]]`."""
    lines = [f"tokenizer = {json.dumps(str(DEBUG_TOKENIZER))}", f"output = {json.dumps(str(folder / 'tokens'))}"]
    for name in names:
        table = {"name": name, "source": str(folder / "text" / f"{name}.jsonl"), **settings}
        lines += ["", "[[dataset]]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path = folder / "datasets.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_text(folder: Path, texts: dict[str, str], name: str = "a") -> Path:
    """Writes `<folder>/text/<name>.jsonl` with one line per id and text."""
    path = folder / "text" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items()))
    return path


def _document(rng: random.Random, corpus: int, sentences: int) -> str:
    """Sentences about one noun that is repeated through the document; odd corpora turn the order of the words."""
    subject = rng.choice(_NOUNS)
    parts = []
    for count in range(1, sentences + 1):
        verb, thing = rng.choice(_VERBS), rng.choice(_NOUNS)
        words = ["The", subject, verb, "the", thing, str(count)]
        parts.append(" ".join(words if corpus % 2 == 0 else [*words[3:], *words[:3]]) + ".")
    return "\n".join(parts)
