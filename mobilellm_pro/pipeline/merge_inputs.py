"""What a merge needs to be there: checkpoints of one architecture and one parent, and text to score them on."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mobilellm_pro.config import JobConfig, JobError
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.held_out import held_out_documents
from mobilellm_pro.model.checkpoint import RunCheckpoint, checkpoint_problems, find_checkpoint
from mobilellm_pro.model.hugging_face import read_config
from mobilellm_pro.model.registry import configured_args, model_on_meta
from mobilellm_pro.model.stored_parameters import StoredParameters
from mobilellm_pro.pipeline.merge_plan import MergePlan

PARTS = ("dev", "valid")
"""Of the corpora: choices are made on the first, reports on the second."""


@dataclass(frozen=True)
class MergeInputs:
    """What is merged, checked."""

    parent: RunCheckpoint
    steps: tuple[Path, ...]
    """The folder `step-N` of each branch."""

    tokenizer: Tokenizer
    content: dict[str, str]
    """Of the parent and each branch a digest that changes with the weights."""


def open_inputs(plan: MergePlan) -> MergeInputs:
    """Finds and checks the checkpoints, the corpora and the teacher; reads no large tensor.

    Raises:
        JobError: with everything that is missing or does not fit.
    """
    found: list[str] = []
    runs = {}
    for branch in plan.branches:
        run = _find(branch.checkpoint, f"branch {branch.name}", found)
        if run is not None:
            runs[branch.name] = run
    parent = _parent(plan, runs, found)
    if parent is not None:
        found += _misfits(plan, runs, parent)
    tokenizer = _tokenizer(plan, parent, found)
    if tokenizer is not None:
        found += _text_problems(plan, tokenizer)
    if plan.search.objective == "kl":
        try:
            read_config(plan.job.teacher.path)
        except (ValueError, OSError) as error:
            found.append(f"teacher.path: {error}")
    if found or parent is None or tokenizer is None:
        raise JobError(str(plan.path), list(dict.fromkeys(found)))
    steps = tuple(runs[branch.name].step for branch in plan.branches)
    content = {"parent": _digest(parent.config, parent.step)}
    content |= {name: _digest(parent.config, run.step) for name, run in runs.items()}
    return MergeInputs(parent, steps, tokenizer, content)


def settings_of(plan: MergePlan, inputs: MergeInputs) -> dict[str, Any]:
    """What the result depends on, as JSON values: another start in the same folder must agree."""
    values: dict[str, Any] = {f"search.{key}": value for key, value in vars(plan.search).items() if key != "memory_gib"}
    values |= {"seed": plan.seed, "dtype": plan.dtype, "hugging_face_dtype": plan.hugging_face_dtype}
    values |= {"warnings.barrier_points": plan.warnings.barrier_points}
    values |= {"dev_tokens": plan.dev_tokens, "valid_tokens": plan.valid_tokens}
    values |= {"longest_document_tokens": plan.job.validation.seq_len}
    values |= {"weights": plan.given, "branches": [branch.name for branch in plan.branches]}
    values |= {"domains": [[domain.name, domain.clusters] for domain in plan.domains]}
    values |= {f"weights of {name}": digest for name, digest in inputs.content.items()}
    for part in PARTS:
        digest = hashlib.sha256()
        for name, ids in held_out_documents(text_settings(plan, part), inputs.tokenizer):
            digest.update(name.encode() + ids.astype("<i4").tobytes())
        values[f"text of {part}"] = digest.hexdigest()[:16]
    return values


def text_settings(plan: MergePlan, part: str) -> dict[str, Any]:
    """Which documents are read, for `held_out_documents`: of each domain as many tokens."""
    tokens = plan.dev_tokens if part == "dev" else plan.valid_tokens
    return {
        "corpora": [[domain.name, domain.path, 1.0] for domain in plan.domains],
        "clusters": {domain.name: domain.clusters for domain in plan.domains if domain.clusters is not None},
        "tokens": tokens * len(plan.domains),
        "longest_document_tokens": plan.job.validation.seq_len,
        "split": part,
    }


def _find(checkpoint: str, who: str, found: list[str]) -> RunCheckpoint | None:
    if (Path(checkpoint) / "config.json").is_file():
        found.append(f"{who}: {checkpoint} is a Hugging Face folder; give the run folder or its step-N")
        return None
    try:
        return find_checkpoint(checkpoint)
    except FileNotFoundError:
        expected = "a run folder with config.toml and a complete checkpoint/step-N, or such a step-N"
        found.append(f"{who}: {checkpoint}: expected {expected}; has its phase run?")
    except (ValueError, OSError) as error:
        found.append(f"{who}: {error}")
    return None


def _parent(plan: MergePlan, runs: dict[str, RunCheckpoint], found: list[str]) -> RunCheckpoint | None:
    """The checkpoint that the branches' configurations name, which must be one and the plan's."""
    named: dict[Path, list[str]] = {}
    for name, run in runs.items():
        checkpoint = run.config.checkpoint
        if not checkpoint.initial_load_path:
            found.append(
                f"branch {name}: began from random weights (checkpoint.initial_load_path of {run.step} is empty)"
            )
        elif checkpoint.initial_load_in_hf:
            found.append(
                f"branch {name}: began from a Hugging Face folder ({checkpoint.initial_load_path}); convert that to "
                "DCP and begin all branches from there"
            )
        else:
            named.setdefault(Path(os.path.realpath(checkpoint.initial_load_path)), []).append(name)
    if len(named) > 1:
        lines = "; ".join(f"{', '.join(names)} from {path}" for path, names in named.items())
        found.append(
            f"the branches began from different checkpoints: {lines}; only branches of one parent can be merged"
        )
    parent = _find(plan.parent, "parent", found) if plan.parent else None
    if not plan.parent and len(named) == 1:
        parent = _find(str(next(iter(named))), "parent", found)
    if parent is not None and named and os.path.realpath(parent.step) not in map(str, named):
        lines = "; ".join(f"{', '.join(names)} from {path}" for path, names in named.items())
        found.append(f"parent: {os.path.realpath(parent.step)}, but the branches began from others: {lines}")
    return parent


def _misfits(plan: MergePlan, runs: dict[str, RunCheckpoint], parent: RunCheckpoint) -> Iterator[str]:
    """Branches whose architecture, tensors or tokenizer are not the parent's, and checkpoints that occur twice."""
    model, ours = model_on_meta(parent.config), vars(configured_args(parent.config))
    yield from (f"parent: {problem}" for problem in checkpoint_problems(model, parent.step))
    seen = {os.path.realpath(parent.step): "the parent"}
    for name, run in runs.items():
        args = configured_args(run.config)
        theirs = {item.name: getattr(args, item.name) for item in fields(args)}
        for key in theirs:
            if theirs[key] != ours.get(key):
                yield f"branch {name}: {key} is {theirs[key]}, the parent's is {ours.get(key)}: no average of the two"
        yield from (f"branch {name}: {problem}" for problem in checkpoint_problems(model, run.step))
        if run.config.data.tokenizer != parent.config.data.tokenizer:
            tokenizer = run.config.data.tokenizer
            yield f"branch {name}: data.tokenizer is {tokenizer}, the parent's is {parent.config.data.tokenizer}"
        place = os.path.realpath(run.step)
        if place in seen:
            yield f"branch {name}: {run.step} is {seen[place]}'s checkpoint too; give each branch one of its own"
        seen[place] = name


def _tokenizer(plan: MergePlan, parent: RunCheckpoint | None, found: list[str]) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer.load(plan.job.data.tokenizer)
    except (ValueError, OSError) as error:
        found.append(f"data.tokenizer of the job: {error}")
        return None
    vocabulary = None if parent is None else vars(configured_args(parent.config)).get("vocab_size")
    if vocabulary not in (None, tokenizer.vocab_size):
        found.append(
            f"data.tokenizer of the job: {plan.job.data.tokenizer} has {tokenizer.vocab_size} ids, the models have "
            f"{vocabulary}; give a job of their tokenizer"
        )
    return tokenizer


def _text_problems(plan: MergePlan, tokenizer: Tokenizer) -> Iterator[str]:
    """Domains without text in one of the parts."""
    for part in PARTS:
        settings = text_settings(plan, part)
        for corpus in settings["corpora"]:
            try:
                alone = {**settings, "corpora": [corpus], "tokens": 2}
                if not any(True for _ in held_out_documents(alone, tokenizer)):
                    yield f"domain {corpus[0]}: no document of two tokens in the part {part!r} of {corpus[1]}"
            except (ValueError, OSError) as error:
                yield f"domain {corpus[0]}: {error}"


def _digest(config: JobConfig, step: Path) -> str:
    """Of the parameters with one dim, the norms': small, and no step of a training leaves them as they were."""
    stored, digest = StoredParameters(step), hashlib.sha256()
    for name, parameter in model_on_meta(config).named_parameters():
        if parameter.ndim == 1:
            digest.update(stored.read(name).double().numpy().tobytes())
    return digest.hexdigest()[:16]
