"""What the keys of evaluations during training must be to each other and to the rest."""

from collections.abc import Iterator

from mobilellm_pro.config.config_error import Issue
from mobilellm_pro.config.job_config import JobConfig


def check_validation(config: JobConfig) -> Iterator[Issue]:
    """How much held-out text is read."""
    steps = config.validation.steps
    if config.validation.enable and steps <= 0:
        keys = ("validation.steps", "validation.enable")
        yield Issue(keys, f"{steps}", "a positive number: ranks that ran out of text at different steps would hang")


def check_suite(config: JobConfig) -> Iterator[Issue]:
    """When the suite is run, and the model that takes it; the suite itself is checked where it is read."""
    evaluation = config.evaluation
    if not evaluation.suite:
        return
    if evaluation.freq < 1:
        yield Issue(("evaluation.freq",), str(evaluation.freq), "a positive number")
    if config.model.name == "llama4_text":
        keys = ("evaluation.suite", "model.name")
        yield Issue(keys, f'"{evaluation.suite}" for a teacher, which has no KV cache', "nothing: students are tested")


def check_needle(config: JobConfig) -> Iterator[Issue]:
    """The grid of the needle test, and the model that takes it."""
    needle, seq_len = config.needle, config.training.seq_len
    if not needle.enable:
        return
    if needle.freq < 1:
        yield Issue(("needle.freq",), str(needle.freq), "a positive number")
    wrong = {mismatch.place: mismatch for mismatch in needle.mismatches()}
    for name, mismatch in wrong.items():
        yield Issue((f"needle.{name}", "needle.enable"), mismatch.found, mismatch.expected)
    if config.model.name == "llama4_text":
        found = "true for a teacher, which has no KV cache"
        yield Issue(("needle.enable", "model.name"), found, "false: students only are tested")
    if "lengths" not in wrong and max(needle.lengths) > seq_len and not needle.allow_longer:
        found = f"{max(needle.lengths)} with training.seq_len = {seq_len}"
        expected = f"lengths up to {seq_len}, or needle.allow_longer = true"
        yield Issue(("needle.lengths", "training.seq_len", "needle.allow_longer"), found, expected)
