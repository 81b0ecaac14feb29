"""The `contamination` verb: `contamination.contamination` for the corpora of a job."""

from typing import Any

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.contamination import contamination


def job_contamination(
    config: JobConfig, evaluation: str, *, ngram: int = 13, output: str | None = None
) -> dict[str, Any]:
    """Count evaluation documents that share a run of tokens with a job's training text, and score the others alone.

    Writes contamination.json and contamination.md, and prints the table.

    Args:
        config: TOML file of a job: its corpora are searched as a whole, its tokenizer reads the documents.
        evaluation: folder that `evaluate` wrote.
        ngram: consecutive tokens that count as an overlap.
        output: folder to write to; default the evaluation's.

    Returns:
        What contamination.json holds.

    Raises:
        FileNotFoundError: no such corpus or tokenizer.
        ValueError: the folder holds no finished evaluation; a corpus of another tokenizer; ngram below 1.
    """
    corpora = {dataset.name: dataset.path for dataset in config.data.datasets}
    return contamination(evaluation, corpora, Tokenizer.load(config.data.tokenizer), ngram=ngram, output=output)
