"""A decoder's program in ExecuTorch's Python runtime: load, prefill in chunks, continue greedily.

    program = DeviceProgram(Path("outputs/model"))
    new_ids = program.continue_tokens(prompt_ids, max_new_tokens=64)

The same two files run under the runtimes for phones; `model.ptd` must lie beside `model.pte`.
"""

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

PROGRAM_FILE, DATA_FILE = "model.pte", "model.ptd"

_OPERATORS = ("executorch.extension.llm.custom_ops.custom_ops", "executorch.kernels.quantized")
"""Modules that register the kernels of attention, cache and lookup."""


class ExecutorchMissing(ValueError):
    """The extra `export` was not installed."""


def import_executorch() -> ModuleType:
    """The Python runtime with all kernels that an exported decoder uses.

    Raises:
        ExecutorchMissing: says what to install.
    """
    if find_spec("executorch") is None:
        raise ExecutorchMissing(
            "this needs ExecuTorch, which the extra `export` installs: pip install 'mobilellm-pro[export]', or in a "
            "checkout pip install -e '.[export]'"
        )
    runtime = importlib.import_module("executorch.extension.pybindings.portable_lib")
    for name in _OPERATORS:
        importlib.import_module(name)
    return runtime


class DeviceProgram:
    """One sequence in a loaded program.

    Attributes:
        max_tokens: room for tokens.
        chunk_tokens: longest chunk of a prompt.
        vocab_size: number of ids.
        num_tokens: tokens so far.
    """

    def __init__(self, folder: Path, threads: int | None = None):
        """Loads `model.pte` and `model.ptd`.

        Args:
            folder: with both files.
            threads: of all programs of this process; default one a core.

        Raises:
            ExecutorchMissing: it is not installed.
            FileNotFoundError: one of the files is missing.
        """
        runtime = import_executorch()
        program, data = folder / PROGRAM_FILE, folder / DATA_FILE
        for path in (program, data):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; an exported program is the two files of one export")
        if threads is not None:
            runtime._unsafe_reset_threadpool(threads)
        self._module = runtime._load_for_executorch(str(program), str(data))
        self.max_tokens, self.chunk_tokens, self.vocab_size = (
            int(self._module.run_method(name, ())[0]) for name in ("max_tokens", "chunk_tokens", "vocab_size")
        )
        self.num_tokens = 0

    def reset(self) -> None:
        """Begins a new sequence; what the cache holds is no longer seen."""
        self.num_tokens = 0

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Takes in tokens, in chunks.

        Args:
            tokens: at least one.

        Returns:
            Logits after the last of them, fp32 [V].

        Raises:
            ValueError: no tokens, ids outside of the vocabulary, or more tokens than there is room for.
        """
        if not tokens:
            raise ValueError("no tokens; expected at least one (bos alone will do)")
        if outside := [token for token in tokens if not 0 <= token < self.vocab_size]:
            raise ValueError(f"token id {outside[0]}; this program knows 0 to {self.vocab_size - 1}")
        if self.num_tokens + len(tokens) > self.max_tokens:
            raise ValueError(
                f"{self.num_tokens + len(tokens):,} tokens; this program was exported for {self.max_tokens:,}: export "
                "it with more"
            )
        logits = torch.empty(0)
        for chunk in torch.tensor([tokens]).split(self.chunk_tokens, dim=1):
            (logits,) = self._module.forward((chunk.contiguous(), torch.tensor([self.num_tokens])))
            self.num_tokens += chunk.shape[1]
        return logits[0]

    def continue_tokens(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        ends: Callable[[list[int]], bool] | None = None,
    ) -> list[int]:
        """The most likely continuation of a prompt, token by token, in a new sequence.

        Args:
            prompt: at least one id.
            max_new_tokens: at most that many.
            stop_ids: the first of these ends it, and is its last token.
            ends: whether it may also stop with the new ids so far; asked after each token.

        Raises:
            ValueError: as `extend`.
        """
        self.reset()
        new: list[int] = []
        tokens = list(prompt)
        while len(new) < max_new_tokens:
            tokens = [int(self.extend(tokens).argmax())]
            new += tokens
            if tokens[0] in stop_ids or (ends is not None and ends(new)):
                break
        return new
