"""OpenRewriteEval (Shu et al., "RewriteLM", 2023) and TLDR9+ (Sotudeh et al., 2021): texts scored by ROUGE-L.

Both report `rouge_l`, the mean of the documents' scores, and `rouge_l_micro`, the score of the summed counts of words
(see `rouge`). In evaluations of Llama "micro_avg" is the mean over all documents, not over the kinds of rewriting
(`macro_avg`); if the paper's "micro_avg/rougeL" of OpenRewrite is that, it is `rouge_l` here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm_pro.evaluation.tasks.local_files import Source, read_rows, require_folder
from mobilellm_pro.evaluation.tasks.rouge import Counts, rouge_l, rouge_l_counts

OPENREWRITE = Source(
    "openrewrite",
    "one file .csv, .jsonl or .parquet with the columns source, comment (or instruction) and target (or reference)",
    "openrewriteeval_aaai24.zip of https://github.com/google-research/google-research/tree/master/rewritelm",
)
TLDR9 = Source(
    "tldr9",
    "test*.json or test*.jsonl with a line {'document': ..., 'summary': ...} a post",
    "https://github.com/sajastu/reddit_collector (TLDR9+)",
)


def read_openrewrite(folder: Path) -> list[dict[str, str]]:
    """Rows of source, instruction and reference.

    Raises:
        ValueError: not exactly one file of data, or a malformed one.
    """
    require_folder(folder, OPENREWRITE)
    kinds = (".csv", ".jsonl", ".parquet")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in kinds]
    if len(files) != 1:
        found = ", ".join(str(path.relative_to(folder)) for path in files) or "no file of data"
        raise OPENREWRITE.mistake(folder, f"found {found}")
    columns = {"source": ["source"], "instruction": ["instruction", "comment"], "reference": ["reference", "target"]}
    return read_rows(files[0], columns, OPENREWRITE)


def read_tldr9(folder: Path) -> list[dict[str, str]]:
    """Rows of document and summary, of all files whose names begin with "test", in the order of their names.

    The marks of sentence borders in the published files become spaces.

    Raises:
        ValueError: no such file, or a malformed one.
    """
    require_folder(folder, TLDR9)
    files = [path for path in sorted(folder.rglob("test*")) if path.suffix in (".json", ".jsonl")]
    if not files:
        raise TLDR9.mistake(folder, "no file test*.json or test*.jsonl")
    columns = {"document": ["document"], "summary": ["summary"]}
    rows = [row for path in files for row in read_rows(path, columns, TLDR9)]
    return [{column: _without_marks(text) for column, text in row.items()} for row in rows]


def score_rewrite(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, Any]:
    """rouge_l of one rewritten text, and its counts."""
    return _scores(results[0], doc["reference"])


def score_summary(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, Any]:
    """rouge_l of one summary, and its counts."""
    return _scores(results[0], doc["summary"])


def _scores(candidate: str, reference: str) -> dict[str, float | Counts]:
    counts = rouge_l_counts(candidate, reference)
    return {"rouge_l": rouge_l(counts), "rouge_l_micro": counts}


def _without_marks(text: str) -> str:
    return " ".join(text.replace("</s><s>", " ").replace("<s>", " ").replace("</s>", " ").split())
