"""An exported ExecuTorch program as evaluations use it: one sequence at a time, in the program's own arithmetic."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mobilellm_pro.convert.executorch_runtime import DeviceProgram
from mobilellm_pro.evaluation.text_model import Ending, Sampling, Score


class ProgramModel:
    """The two files of an export, run by ExecuTorch's Python runtime.

    A program gives the logits after its last token only, and its local layers forget what is a window back, so an
    ending of several tokens costs its whole sequence, and a call a token.

    Attributes:
        vocab_size: number of ids.
        max_tokens: room of the exported program.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: with model.pte and model.ptd.

        Raises:
            ExecutorchMissing, FileNotFoundError: as `DeviceProgram`.
        """
        self._program = DeviceProgram(folder)
        self.vocab_size, self.max_tokens = self._program.vocab_size, self._program.max_tokens

    def scores(self, endings: Sequence[Ending]) -> Iterator[tuple[int, Score]]:
        """As `TextModel`; endings of one token share the call for what is before them."""
        by_given: dict[tuple[int, ...], list[int]] = {}
        for number, (ids, num_scored) in enumerate(endings):
            by_given.setdefault(tuple(ids[:-num_scored]), []).append(number)
        for given, numbers in by_given.items():
            first = None
            for number in numbers:
                targets = endings[number].ids[len(given) :]
                if first is None or len(targets) > 1:
                    self._program.reset()
                    first = self._program.extend(given)
                logits, log_likelihood, is_greedy = first, 0.0, True
                for place, target in enumerate(targets):
                    if place:
                        logits = self._program.extend([targets[place - 1]])
                    log_likelihood += float(logits[target] - logits.logsumexp(0))
                    is_greedy = is_greedy and int(logits.argmax()) == target
                yield number, Score(log_likelihood, is_greedy)

    def continuations(
        self, prompts: Sequence[list[int]], sampling: Sampling, ends: Callable[[list[int]], bool]
    ) -> Iterator[tuple[int, list[int]]]:
        """As `TextModel`; always the most likely token.

        Raises:
            ValueError: sampling was asked for.
        """
        if sampling.temperature:
            raise ValueError(f"temperature = {sampling.temperature}; a program continues greedily, give temperature 0")
        for number, prompt in enumerate(prompts):
            yield number, self._program.continue_tokens(prompt, sampling.max_new_tokens, sampling.stop_ids, ends)
