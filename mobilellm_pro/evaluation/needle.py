"""Needle in a haystack: does the model find one number in a text as long as its context? The `needle` verb.

    mobilellm-pro needle outputs/mobilellm_pro_1b/2_context --haystack data/tokens/fineweb_edu
    torchrun --nproc-per-node 8 -m mobilellm_pro needle outputs/mobilellm_pro_1b/2_context

The prompt is in `needle_prompt`, the grid in `needle_grid`, the files of the output folder in `needle_results`.
`needle_score` is the same test without files, for a model in memory; `needle_online` runs it while a model trains.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.needle_grid import (
    Cell,
    CellResult,
    Grid,
    batches,
    cell_prompt,
    cells_of_rank,
    check_prompts,
)
from mobilellm_pro.evaluation.needle_haystack import Filler, Haystack, open_haystack
from mobilellm_pro.evaluation.needle_plot import plot_heat_map
from mobilellm_pro.evaluation.needle_prompt import TEMPLATE_VERSION, answer_matches
from mobilellm_pro.evaluation.needle_results import (
    PICTURE,
    agree_on_cells,
    append_cell,
    read_cells,
    summary,
    table,
    write_result,
)
from mobilellm_pro.evaluation.student_checkpoint import load_student
from mobilellm_pro.model.generation import continue_tokens
from mobilellm_pro.model.student import Student
from mobilellm_pro.quantization.scheme import CacheDtype

Generate = Callable[[Tensor, int], Tensor]
"""(prompts [B, S], number of tokens) -> greedy continuation [B, at most that number]."""


def needle(
    checkpoint: str,
    *,
    haystack: str | None = None,
    lengths: list[int] | None = None,
    depths: int = 9,
    needles: int = 5,
    output: str | None = None,
    batch: int = 1,
    seed: int = 0,
    answer_tokens: int = 16,
    dtype: Literal["float32", "bfloat16"] | None = None,
    cache_dtype: Literal["model", "int8"] | None = None,
    prefill_tokens: int = 2048,
    tokenizer: str | None = None,
    allow_longer: bool = False,
) -> dict[str, Any] | None:
    """Hide numbers in long texts, ask a student for them, and score it: a table, needle.json and a heat map.

    Each cell of the grid lengths x depths x needles is a prompt with one 7-digit number in it, which the model must
    name (greedy decoding, exact match). Started again with the same output, it goes on where it stopped; under torchrun
    the ranks share the cells, and the last one writes the result.

    Args:
        checkpoint: a run folder, one `step-N` folder, or a Hugging Face folder.
        haystack: a prepared corpus (folder of token shards) to take text from; default a generated filler.
        lengths: tokens of prompt and answer together; default ten, evenly spaced from 2,000 to 131,072.
        depths: number of places of the needle, evenly spaced from 0 to 100 % of the text.
        needles: prompts of each length and depth.
        output: folder to write to; default outputs/needle/ and the name of the checkpoint.
        batch: rows at a time, of prompts with equally many tokens.
        seed: of the texts and numbers.
        answer_tokens: to generate, and to leave room for.
        dtype: of the weights; default bfloat16 on a GPU, float32 on a CPU.
        cache_dtype: of the KV cache; int8 is the device's. Default: what the student is trained for.
        prefill_tokens: of a prompt at a time.
        tokenizer: tiktoken file or "llama4"; default the checkpoint's own.
        allow_longer: prompts beyond the length that the model was trained on are no error.

    Returns:
        What needle.json holds, or None on a rank that does not finish last.

    Raises:
        FileNotFoundError: no such checkpoint, tokenizer or corpus.
        ValueError: not a student's checkpoint; a length too short or too long; an output with cells of other settings.
    """
    grid = Grid(**({} if lengths is None else {"lengths": tuple(lengths)}), num_depths=depths, num_needles=needles,
                seed=seed, answer_tokens=answer_tokens)  # fmt: skip
    _check_sizes(batch=batch, prefill_tokens=prefill_tokens)
    loaded = load_student(checkpoint, dtype)
    student = loaded.model
    _check_lengths(grid, sys.maxsize if allow_longer else loaded.max_tokens, checkpoint)
    text = _tokenizer(tokenizer or loaded.tokenizer, student, checkpoint)
    source = open_haystack(haystack, text)
    check_prompts(grid, source, text)  # an error now, not in hours
    folder = Path(output or f"outputs/needle/{_name(checkpoint)}")
    types = {"dtype": loaded.dtype, "cache_dtype": cache_dtype or student.cache_dtype}
    settings = _settings(grid, source, text, student) | types
    agree_on_cells(folder, settings)
    _run_missing_cells(folder, greedy(student, text, prefill_tokens, cache_dtype), text, grid, source, batch)
    return _finished(folder, grid, {"checkpoint": checkpoint, "settings": settings})


def needle_score(
    model: Student,
    tokenizer: Tokenizer,
    *,
    grid: Grid | None = None,
    haystack: Haystack | None = None,
    batch: int = 1,
    prefill_tokens: int = 2048,
    cache_dtype: CacheDtype | None = None,
) -> dict[str, Any]:
    """Runs a grid on a model in memory.

    Where a process group exists, all its ranks must call it, each with the whole model: they share the cells, run them
    without messages, and exchange what they found once, at the end.

    Args:
        model: whole on this device; its mode (`train`, `eval`) stays as it is, no gradients are made.
        tokenizer: the model's.
        grid: default the 450 cells.
        haystack: default the generated filler.
        batch: rows at a time.
        prefill_tokens: of a prompt at a time.
        cache_dtype: of the KV cache; default: what the student is trained for.

    Returns:
        `summary` of the grid: score in percent, correct, total, by_length, by_depth, cells.

    Raises:
        ValueError: the model is sharded; a length is too short for a prompt.
    """
    grid = grid or Grid()
    _check_sizes(batch=batch, prefill_tokens=prefill_tokens)
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if sharded:
        raise ValueError(
            f"needle_score: {len(sharded)} parameters are sharded ({sharded[0]}, ...); gather the model first"
        )
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = cells_of_rank(grid.cells(), rank, world_size)
    generate = greedy(model, tokenizer, prefill_tokens, cache_dtype)
    results = [list(run_cells(generate, tokenizer, grid, own, haystack or Filler(), batch))]
    if world_size > 1:
        results *= world_size
        dist.all_gather_object(results, results[rank])
    return summary(grid, list(chain.from_iterable(results)))


def run_cells(
    generate: Generate,
    tokenizer: Tokenizer,
    grid: Grid,
    cells: Sequence[Cell],
    haystack: Haystack,
    batch: int = 1,
) -> Iterator[CellResult]:
    """Asks for the numbers of some cells of a grid, the shortest prompts first.

    Args:
        generate: any model's greedy decoding.
        tokenizer: the model's.
        grid: of the cells.
        cells: to run.
        haystack: text around the needles.
        batch: rows at a time.

    Yields:
        a result as soon as it is there.
    """
    specials = set(tokenizer.special_ids.values())
    for length in sorted({cell.length for cell in cells}):
        prompts = [cell_prompt(cell, grid, haystack, tokenizer) for cell in cells if cell.length == length]
        for group in batches(prompts, batch):
            rows = torch.stack([torch.from_numpy(prompt.ids).long() for prompt in group])
            for prompt, new in zip(group, generate(rows, grid.answer_tokens).tolist(), strict=True):
                answer = tokenizer.decode([token for token in new if token not in specials])
                yield CellResult(
                    prompt.cell, len(prompt.ids), prompt.value, answer, answer_matches(answer, prompt.value)
                )


def greedy(
    model: Student, tokenizer: Tokenizer, prefill_tokens: int = 2048, cache_dtype: CacheDtype | None = None
) -> Generate:
    """A student's greedy decoding with a KV cache, on its own device; ends at the end of the text."""
    device = model.embed_tokens.weight.device

    def generate(prompts: Tensor, count: int) -> Tensor:
        return continue_tokens(
            model,
            prompts.to(device),
            count,
            stop_ids=(tokenizer.eos_id,),
            prefill_tokens=prefill_tokens,
            cache_dtype=cache_dtype,
        )

    return generate


def model_fingerprint(model: Student) -> str:
    """sha256 over architecture and weights: equal fingerprints give equal answers on one machine."""
    digest = hashlib.sha256(repr(model.model_args).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _name(checkpoint: str) -> str:
    """The folder's name; for a checkpoint step-N of a run, the run's name and the step."""
    folder = Path(checkpoint).resolve()
    return f"{folder.parents[1].name}_{folder.name}" if folder.name.startswith("step-") else folder.name


def _check_lengths(grid: Grid, max_tokens: int, checkpoint: str) -> None:
    if max(grid.lengths) > max_tokens:
        raise ValueError(
            f"lengths: {max(grid.lengths)} tokens are more than the {max_tokens} that {checkpoint} was trained on; "
            "give shorter --lengths, or --allow-longer to see what it does beyond them"
        )


def _tokenizer(source: str, student: Student, checkpoint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > student.model_args.vocab_size:
        raise ValueError(
            f"{source}: {tokenizer.vocab_size} ids, but {checkpoint} knows {student.model_args.vocab_size}; "
            "give its own tokenizer"
        )
    return tokenizer


def _settings(grid: Grid, haystack: Haystack, tokenizer: Tokenizer, student: Student) -> dict[str, Any]:
    """What decides about prompts and answers, but for the number formats."""
    made_of = {"haystack": haystack.identity, "template": TEMPLATE_VERSION, "tokenizer": tokenizer.fingerprint}
    return asdict(grid) | made_of | {"model": model_fingerprint(student)}


def _finished(folder: Path, grid: Grid, description: dict[str, Any]) -> dict[str, Any] | None:
    """Table, needle.json and heat map, if all ranks' cells are there."""
    results = read_cells(folder, grid.cells())
    if len(results) < len(grid.cells()):
        return None
    result = {**description, **summary(grid, list(results.values()))}
    plot_heat_map(result, _name(description["checkpoint"]), folder / PICTURE)
    write_result(folder, result)
    print(table(result) + f"\n{result['correct']}/{result['total']} = {result['score']:.2f} %, in {folder}")
    return result


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}; expected at least 1")


def _run_missing_cells(
    folder: Path, generate: Generate, tokenizer: Tokenizer, grid: Grid, haystack: Haystack, batch: int
) -> None:
    """Runs what this rank has to do and no rank has done; a bar in a terminal, else a line a cell."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = cells_of_rank(grid.cells(), rank, world_size)
    done = read_cells(folder, grid.cells())
    missing = [cell for cell in own if cell.index not in done]
    bar = tqdm(
        total=len(own), initial=len(own) - len(missing), unit="cell", desc="needle", disable=world_size > 1 or None
    )
    for count, result in enumerate(run_cells(generate, tokenizer, grid, missing, haystack, batch), start=1):
        append_cell(folder, rank, result)
        bar.update()
        if bar.disable:
            outcome = "found" if result.correct else f"not found: {result.answer!r}"
            place = f"{result.cell.length} tokens, {result.cell.depth:g} % deep"
            print(
                f"needle, rank {rank}, {len(own) - len(missing) + count}/{len(own)}: {place}: {outcome}",
                file=sys.stderr,
            )
    bar.close()
