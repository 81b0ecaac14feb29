"""Our models in lm-eval-harness: `--model mobilellm_pro --model_args checkpoint=FOLDER`.

The harness asks in text; this turns text into ids as its own `hf` model does with the tokenizer of an exported folder
(begin of text first, trailing spaces of a context go to the ending, long sequences lose their beginning), so that both
give the same numbers. Under torchrun every rank holds the model and answers its share of the requests; the harness
itself sees one process, so that its prompts do not depend on the number of ranks.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from mobilellm_pro.convert.executorch_runtime import PROGRAM_FILE
from mobilellm_pro.data.hugging_face_tokenizer import write_hugging_face_tokenizer
from mobilellm_pro.data.special_tokens import BOS, EOS, EOT, HEADER_END, HEADER_START
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.needle_task import needle_task
from mobilellm_pro.evaluation.program_model import ProgramModel
from mobilellm_pro.evaluation.ranks import gathered, join_ranks, rank, share_of_rank, wait_for_ranks
from mobilellm_pro.evaluation.student_checkpoint import load_student
from mobilellm_pro.evaluation.suite import DEFAULT_NEW_TOKENS, NeedleTable
from mobilellm_pro.evaluation.text_model import Ending, Sampling, StudentModel, TextModel

_SPECIAL = re.compile(r"(<\|[a-z_]+\|>)")


class HarnessModel(TemplateLM):
    """A model in memory as lm-eval calls it.

    Attributes:
        max_length: tokens of the longest sequence; longer ones lose their beginning.
    """

    def __init__(self, model: TextModel, tokenizer: Tokenizer, max_length: int | None = None) -> None:
        """
        Args:
            model: the same on every rank, if there is a process group.
            tokenizer: the model's.
            max_length: default the model's longest sequence.

        Raises:
            ValueError: a tokenizer of another model.
        """
        super().__init__()
        if tokenizer.vocab_size != model.vocab_size:
            raise ValueError(
                f"{tokenizer.source}: {tokenizer.vocab_size} ids, the model has {model.vocab_size}; give its own"
            )
        self._model, self._text = model, tokenizer
        self.max_length = max_length or model.max_tokens

    @property
    def eot_token_id(self) -> int:
        """End of text, which ends continuations."""
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has no context."""
        return self._text.bos_id

    @property
    def tokenizer_name(self) -> str:
        """For the harness' cache of requests."""
        return self._text.fingerprint

    def write_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer for `transformers`, with which RULER's tasks count tokens."""
        if rank() == 0:
            write_hugging_face_tokenizer(self._text, folder, max_tokens=self.max_length)
        wait_for_ranks()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text, in the format of Llama 4, whose special names are then special tokens."""
        turns = [_turn(message["role"]) + message["content"] + EOT for message in chat_history]
        if add_generation_prompt:
            return BOS + "".join(turns) + _turn("assistant")
        return BOS + "".join(turns).removesuffix(EOT)  # the answer is begun already

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with begin of text in front unless that is written there or not wanted.

        Special names in it are text, but in a conversation, which begins with a turn's header, they are the tokens.
        """
        written = add_special_tokens is None and string.startswith(BOS)
        ids = [self._text.bos_id] if written or add_special_tokens is not False else []
        rest = string.removeprefix(BOS) if written else string
        if not rest.startswith(HEADER_START):
            return ids + self._text.encode(rest)
        for part in _SPECIAL.split(rest):
            special = self._text.special_ids.get(part)
            ids += self._text.encode(part) if special is None else [special]
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut where the context's end; of what the tokenizer made one token, each on its own."""
        given, after = super()._encode_pair(context, continuation)
        return given, after or self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores of (texts or None, ids of a context, ids of what comes after it)."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        endings = [self._ending(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(endings)), key=lambda number: endings[number].ids)  # what begins alike stays together
        own = share_of_rank(order, [len(ending.ids) for ending in endings])
        scores = self._model.scores([endings[number] for number in own])
        found = {}
        for place, score in self._progress(scores, len(own), "likelihoods", disable_tqdm):
            number = own[place]
            found[number] = score.log_likelihood, score.is_greedy
            if requests[number][0] is not None:  # a part of a rolling text has no request of its own
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        for number, result in gathered(found).items():
            results[number] = result
        return results

    def _ending(self, context: list[int], continuation: list[int]) -> Ending:
        if len(continuation) > self.max_length:
            raise ValueError(
                f"an answer of {len(continuation)} tokens for a model of {self.max_length}: leave the task out, or "
                "give a larger max_length"
            )
        return Ending((context + continuation)[-(self.max_length + 1) :], len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of whole texts, each in windows that do not overlap, of `max_length` tokens."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to its first stop sequence or the end of the text."""
        results = [""] * len(requests)
        for settings, numbers in _alike(requests):
            options = normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS)
            stops = handle_stop_sequences(options.pop("until", None), eos=EOS)
            sampling = self._sampling(options)
            room = self.max_length - sampling.max_new_tokens
            prompts = {number: self.tok_encode(requests[number].args[0])[-room:] for number in numbers}
            order = sorted(numbers, key=lambda number: len(prompts[number]))
            own = share_of_rank(order, {number: sampling.max_new_tokens + len(ids) for number, ids in prompts.items()})
            new = self._model.continuations([prompts[number] for number in own], sampling, self._stop_test(stops))
            found = {}
            for place, ids in self._progress(new, len(own), "continuations", disable_tqdm):
                number = own[place]
                found[number] = postprocess_generated_text(self._decode(ids), stops, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
            for number, text in gathered(found).items():
                results[number] = text
        return results

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        new_tokens = options.pop("max_gen_toks")
        if not 0 < new_tokens < self.max_length:
            raise ValueError(
                f"{new_tokens} new tokens for a model of {self.max_length}; give the task a smaller max_gen_toks, or "
                "the model a larger max_length"
            )
        sampled = options.pop("do_sample", False)
        temperature = float(options.pop("temperature", 1.0)) if sampled else 0.0
        top_p = float(options.pop("top_p", 1.0))
        if unknown := {key: value for key, value in options.items() if key != "temperature"}:
            known = "do_sample, temperature, top_p, max_gen_toks and until"
            raise ValueError(f"generation_kwargs {unknown}: expected {known}")
        return Sampling(new_tokens, self._text.stop_ids, temperature, top_p)

    def _stop_test(self, stops: Sequence[str]) -> Callable[[list[int]], bool]:
        """Whether a stop sequence is in the end of a continuation."""
        # The last token is new, and no token is shorter than a byte: what is in this tail was not there before.
        tail = max(len(stop.encode()) for stop in stops) + 4

        def ends(ids: list[int]) -> bool:
            text = self._decode(ids[-tail:])
            return any(stop and stop in text for stop in stops)

        return ends

    def _decode(self, ids: Sequence[int]) -> str:
        special = len(self._text.ranks)
        return self._text.decode([token for token in ids if token < special])

    def _progress(self, items: Any, total: int, what: str, silent: bool) -> Any:
        return tqdm(items, total=total, desc=what, disable=True if silent or rank() else None)

    def needle(self, settings: NeedleTable, metric: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        """This project's needle test, as `needle_task` gives it; a collective of all ranks.

        Raises:
            ValueError: the model is a program.
        """
        if not isinstance(self._model, StudentModel):
            raise ValueError("the needle test runs students in memory; leave the column out for a program")
        return needle_task(self._model.student, self._text, settings, metric)


@register_model("mobilellm_pro")
class CheckpointModel(HarnessModel):
    """A checkpoint of any format."""

    def __init__(
        self,
        checkpoint: str,
        dtype: Literal["float32", "bfloat16"] | None = None,
        device: str | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        quantize: str | None = None,
        tree_tokens: int = 2048,
        batch_size: int | str | None = None,
        **unknown: Any,
    ) -> None:
        """Reads a checkpoint; under torchrun on every rank.

        Args:
            checkpoint: a run folder, one `step-N` folder, a Hugging Face folder, a folder of packed four-bit integers,
                or an exported ExecuTorch program's.
            dtype: of the weights; default bfloat16 on a GPU, float32 on a CPU.
            device: default this process' GPU, where there is one.
            tokenizer: tiktoken file or "llama4"; default the checkpoint's own.
            max_length: default the longest row that the model was trained on.
            quantize: a scheme to whose few bits a student in full precision is rounded first.
            tree_tokens: of many sequences at a time in the model.
            batch_size: prompts of equal length that are continued at a time; default 8.

        Raises:
            FileNotFoundError: no such checkpoint or tokenizer.
            ValueError: not a student's, damaged, or an unknown argument.
        """
        if unknown := {key: value for key, value in unknown.items() if key != "max_batch_size"}:
            raise ValueError(f"model_args {', '.join(unknown)}: unknown; {CheckpointModel.__init__.__doc__}")
        join_ranks()
        if device == "cuda:0":  # from lm-eval's command line where nobody has chosen one
            device = None
        folder = Path(checkpoint)
        model: TextModel
        if (folder / PROGRAM_FILE).is_file():
            if given := [name for name, value in (("dtype", dtype), ("quantize", quantize)) if value is not None]:
                raise ValueError(f"{checkpoint}: a program has its own arithmetic; leave out {', '.join(given)}")
            model, own = ProgramModel(folder), str(folder / "tokenizer.model")
        else:
            loaded = load_student(checkpoint, dtype, device, quantize)
            batch = 8 if batch_size is None or batch_size == "auto" else int(batch_size)
            model = StudentModel(loaded.model, loaded.max_tokens, tree_tokens=int(tree_tokens), batch=batch)
            own = loaded.tokenizer
        super().__init__(model, Tokenizer.load(tokenizer or own), max_length)


def _turn(role: str) -> str:
    return f"{HEADER_START}{role}{HEADER_END}\n\n"


def _alike(requests: Sequence[Instance]) -> list[tuple[dict[str, Any], list[int]]]:
    """Settings of generation -> numbers of the requests that have them."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for number, request in enumerate(requests):
        for settings, numbers in groups:
            if settings == request.args[1]:
                numbers.append(number)
                break
        else:
            groups.append((request.args[1], [number]))
    return groups
