"""What the technical report publishes in percent: Tables 4 and 5 (base models) and 7 (instruction-tuned models)."""

MODELS = ("MobileLLM-Pro", "Gemma 3-1B", "Llama 3.2-1B")

SCORES: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "hellaswag": ("HellaSwag", (67.11, 62.30, 65.69)),
    "boolq": ("BoolQ", (76.24, 63.20, 62.51)),
    "piqa": ("PIQA", (76.55, 73.80, 75.14)),
    "social_iqa": ("SIQA", (50.87, 48.90, 45.60)),
    "triviaqa": ("TriviaQA", (39.85, 39.80, 23.81)),
    "nq_open": ("Natural Questions", (15.76, 9.48, 5.48)),
    "arc_challenge": ("ARC-Challenge", (52.62, 38.40, 38.28)),
    "arc_easy": ("ARC-Easy", (76.28, 73.00, 63.47)),
    "winogrande": ("WinoGrande", (62.83, 58.20, 61.09)),
    "openbookqa": ("OBQA", (43.60, None, 37.20)),
}
"""Task as lm-eval calls it -> its name there, and the scores of `MODELS`; None: not published."""

NEEDLE: tuple[str, tuple[float | None, ...]] = ("Needle in a haystack", (100.0, None, 96.80))
"""The same of the needle test."""

QUANTIZED_MODELS = ("MobileLLM-Pro CPU", "MobileLLM-Pro accelerator")

QUANTIZED: dict[str, tuple[float, ...]] = {
    "hellaswag": (64.89, 65.10),
    "boolq": (77.49, 76.36),
    "piqa": (76.66, 75.52),
    "social_iqa": (51.18, 50.05),
    "triviaqa": (37.26, 36.42),
    "nq_open": (15.43, 13.19),
    "arc_challenge": (52.45, 51.24),
    "arc_easy": (76.58, 75.73),
    "winogrande": (62.43, 61.96),
    "openbookqa": (44.20, 40.40),
    "needle": (96.44, 98.67),
}
"""The same of `QUANTIZED_MODELS`, in four bits (Table 5)."""

INSTRUCT: dict[str, tuple[float | None, ...]] = {
    "mmlu": (44.8, 29.9, 49.3),
    "ifeval": (62.0, 80.2, 59.5),
    "mbpp_instruct_sandboxed": (46.8, 35.2, 39.6),
    "humaneval_instruct_sandboxed": (59.8, 41.5, 37.8),
    "arc_challenge": (62.7, None, 59.4),
    "hellaswag": (58.4, None, 41.2),
    "bfcl_v2": (29.4, None, 25.7),
    "openrewrite": (51.0, None, 41.6),
    "tldr9": (16.8, None, 16.8),
}
"""Of the instruction-tuned `MODELS` (Table 7). Its MMLU is the mean over subjects, its IFEval the mean of four."""


def published(suite: str, task: str) -> dict[str, float]:
    """Model -> its published score of a task in percent, in the order of the tables; empty if there is none.

    Args:
        suite: "instruct" means the instruction-tuned models, any other the base models.
        task: as lm-eval calls it, or "needle".
    """
    if suite == "instruct":
        found = dict(zip(MODELS, INSTRUCT.get(task, ()), strict=False))
    else:
        base = NEEDLE[1] if task == "needle" else SCORES.get(task, ("", ()))[1]
        found = dict(zip((*MODELS, *QUANTIZED_MODELS), (*base, *QUANTIZED.get(task, ())), strict=False))
    return {model: score for model, score in found.items() if score is not None}
