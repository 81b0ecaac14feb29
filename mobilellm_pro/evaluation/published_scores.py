"""What the technical report publishes for base models of this size (its Table 4), in percent."""

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
