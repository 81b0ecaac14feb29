"""The `merge` verb: specialists of one parent become one model, M = sum_b w_b theta_b (paper, section 6).

    mobilellm-pro merge train_configs/debug/3_merge.toml

What its folder holds in the end, a run folder for every verb that takes one:

    merge_settings.json   what it was begun with; another start must agree
    candidates.jsonl      weights and scores of the search, on the part "dev" of the corpora, as they become known
    tests.jsonl           bits per byte of the reported models on the part "valid"
    checkpoint/step-0/    the merged model as DCP: for `checkpoint.initial_load_path`, `convert` and the others
    hugging_face/         the same as a Hugging Face folder
    config.toml           the parent's configuration, begun from the parent
    merge.json, merge.md  the table: before, each specialist, uniform and searched average; search.png: the search
    DONE                  written last
"""

import json
import math
import os
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.config import JobConfig, resolved_toml
from mobilellm_pro.convert.conversion import whole_folder
from mobilellm_pro.convert.merged_checkpoint import Branches, write_hugging_face_copy, write_merged
from mobilellm_pro.merging.drift import relative_distances
from mobilellm_pro.merging.line_log import LineLog
from mobilellm_pro.merging.search_plot import draw_search
from mobilellm_pro.merging.weight_search import Candidate, chosen, search_weights
from mobilellm_pro.model.stored_parameters import StoredParameters
from mobilellm_pro.pipeline.data_mix_folder import agree, write_json, write_text
from mobilellm_pro.pipeline.merge_inputs import MergeInputs, open_inputs, settings_of
from mobilellm_pro.pipeline.merge_plan import MergePlan, load_merge_plan
from mobilellm_pro.pipeline.merge_report import SCORES, barriers, row_names, table, warnings_of, weight_rows
from mobilellm_pro.pipeline.merge_score import DomainText, ScoringModel, TeacherKL, bits_per_byte, mean, read_text
from mobilellm_pro.pipeline.merge_suite import SuiteErrors

CANDIDATES, TESTS, RESULT, TABLE, PICTURE = "candidates.jsonl", "tests.jsonl", "merge.json", "merge.md", "search.png"
CHECKPOINT, HUGGING_FACE = "checkpoint", "hugging_face"
STEP = f"{CHECKPOINT}/step-0"


def merge(
    plan: str,
    *,
    output: str | None = None,
    parent: str | None = None,
    branches: list[str] | None = None,
    device: str | None = None,
) -> dict[str, Any] | None:
    """Merge specialists: find the weights of their average, write it, and say what it came to.

    Started again it goes on: no candidate is scored twice, and the result is the same. Only the process of rank 0 does
    anything.

    Args:
        plan: TOML file: branches, domains, how the weights are found.
        output: folder for everything, instead of the file's.
        parent: checkpoint that all branches began with, instead of the file's.
        branches: words name=checkpoint for all branches of the file, instead of its checkpoints.
        device: where models are scored; default cuda where there is one, else cpu.

    Returns:
        what merge.json holds; None on ranks other than the first.

    Raises:
        ConfigError: everything that is wrong with the file, its job and the words.
        JobError: checkpoints, corpora or a teacher that are missing or do not fit.
        ValueError: the folder holds a merge of something else; no candidate has a score that is a number.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    loaded = load_merge_plan(plan, output, parent, branches)
    inputs, folder = open_inputs(loaded), loaded.folder
    if (folder / "config.toml").is_file() and not (folder / "merge_settings.json").is_file():
        raise ValueError(f"{folder}: holds a run that is no merge; choose another output")
    agree(folder, "merge", settings_of(loaded, inputs))
    if (folder / "DONE").is_file():
        print(f"merge: {folder} is DONE", flush=True)
        return json.loads((folder / RESULT).read_text())
    record = _Merge(loaded, inputs, device or ("cuda" if torch.cuda.is_available() else "cpu")).run()
    print(f"merge: {folder / TABLE}", flush=True)
    return record


class _Merge:
    """One merge from the search to DONE."""

    def __init__(self, plan: MergePlan, inputs: MergeInputs, device: str) -> None:
        self.plan, self.inputs, self.device = plan, inputs, device
        self.config = _merged_config(inputs.parent.config, plan.folder, inputs.parent.step)
        self.model = ScoringModel(self.config, device)
        names = [name for name, _ in self.model.model.named_parameters()]
        self.branches = Branches(inputs.steps, names, int(plan.search.memory_gib * 2**30))
        self.parent = StoredParameters(inputs.parent.step)
        self.log = LineLog(plan.folder / CANDIDATES)

    def run(self) -> dict[str, Any]:
        """Searches, writes, tests and reports."""
        candidates, parent_score = self._search()
        best = chosen(candidates, self.plan.search.method)
        if not math.isfinite(best.score):
            raise ValueError(
                f"{self.plan.folder / CANDIDATES}: the score of the weights is no number: the branches diverged"
            )
        self._write(best)
        text = read_text(self.plan, "valid", self.inputs.tokenizer, self.device)
        rows = self._test(text, candidates, best, parent_score)
        tokens = {name: domain.num_tokens for name, domain in text.items()}
        record = {**self._record(candidates, best, rows), "valid_tokens": tokens}
        write_json(self.plan.folder / RESULT, record)
        write_text(self.plan.folder / TABLE, table(record))
        print(table(record), flush=True)
        done = {key: record[key] for key in ("checkpoint", "hugging_face", "weights", "dev_score")}
        done |= {"steps": 0, "configured_steps": 0, "bits_per_byte": rows[-1]["mean"]}
        write_json(self.plan.folder / "DONE", done)
        return record

    def _search(self) -> tuple[list[Candidate], float | None]:
        """Candidates, and the parent's score on the same text."""
        plan = self.plan
        text = read_text(plan, "dev", self.inputs.tokenizer, self.device)
        measure: Callable[..., dict[str, float]] = bits_per_byte
        if plan.search.objective == "kl":
            measure = TeacherKL(plan.job, self.device)
        elif plan.search.objective == "suite":
            measure = SuiteErrors(plan.search.suite, self.inputs.tokenizer, plan.job.training.seq_len)
        parent = self.log.recall({"model": "parent"}, lambda: self._scored(self.parent.read, text, measure))
        number = 0

        def score(weights: np.ndarray, stage: str) -> float:
            nonlocal number
            number += 1
            read = partial(self._average, weights)
            key = {"weights": weight_rows(weights)}
            found = self.log.recall(key, lambda: {"stage": stage, **self._scored(read, text, measure)})
            value = math.inf if found["score"] is None else found["score"]
            print(f"merge: {number} of {plan.search.budget} {stage}: {value:.6f}", flush=True)
            return value

        settings, groups = plan.settings, len(plan.groups.names)
        candidates = search_weights(score, len(self.branches), settings, given=plan.given, groups=groups)
        return candidates, parent["score"]

    def _average(self, weights: np.ndarray, name: str) -> Tensor:
        return self.branches.average(name, weights[self.plan.groups.of(name)])

    def _scored(
        self, read: Callable[[str], Tensor], text: dict[str, DomainText], measure: Callable[..., dict[str, float]]
    ) -> dict[str, Any]:
        values = measure(self.model.fill(read), text)
        return {"score": _finite(mean(list(values.values()))), "by_domain": {k: _finite(v) for k, v in values.items()}}

    def _write(self, best: Candidate) -> None:
        """The merged model in both formats, each as a whole or not at all."""
        plan, folder = self.plan, self.plan.folder
        write_atomically(folder / "config.toml", resolved_toml(self.config))
        if not (folder / STEP / ".metadata").is_file():
            with whole_folder(folder / CHECKPOINT) as temporary:
                step = temporary / Path(STEP).name
                write_merged(step, self.config, self.branches, best.weights, plan.groups, plan.dtype)
        if not (folder / HUGGING_FACE / "config.json").is_file():
            with whole_folder(folder / HUGGING_FACE) as temporary:
                write_hugging_face_copy(temporary, self.config, folder / STEP, plan.hugging_face_dtype)

    def _test(
        self, text: dict[str, DomainText], candidates: list[Candidate], best: Candidate, parent_score: float | None
    ) -> list[dict[str, Any]]:
        """Rows of the table: every reported model on the held-out part."""
        log, rows = LineLog(self.plan.folder / TESTS), []
        reported = {"parent": None, **{f"branch {b.name}": c for b, c in zip(self.plan.branches, candidates[1:])}}
        reported |= {"uniform": candidates[0], "merged": best}
        for key, name in row_names(self.plan).items():
            candidate = reported[key]
            read = self.parent.read if candidate is None else partial(self._average, candidate.weights)
            if key == "merged":  # what was written, rounded as it may be
                read = StoredParameters(self.plan.folder / STEP).read
            found = log.recall({"model": key}, partial(self._scored, read, text, bits_per_byte))
            score = parent_score if candidate is None else candidate.score
            weights = None if candidate is None else weight_rows(candidate.weights)
            row = {"name": name, "bits_per_byte": found["by_domain"], "mean": found["score"]}
            rows.append({**row, "dev_score": None if score is None else _finite(score), "weights": weights})
        return rows

    def _record(self, candidates: list[Candidate], best: Candidate, rows: list[dict[str, Any]]) -> dict[str, Any]:
        plan, names = self.plan, [branch.name for branch in self.plan.branches]
        readers = [partial(self.branches.read, number) for number in range(len(names))]
        distances = dict(zip(names, relative_distances(self.branches.names, self.parent.read, readers)))
        heights = barriers(candidates, names, plan.warnings.barrier_points)
        groups = plan.groups.names
        picture = draw_search(candidates, best.weights, names, groups, score=SCORES[plan.search.objective])
        write_atomically(plan.folder / PICTURE, picture)
        return {
            "branches": names,
            "domains": [domain.name for domain in plan.domains],
            "method": plan.search.method,
            "score": SCORES[plan.search.objective],
            "candidates": len(candidates),
            "stage": best.stage,
            "dev_score": best.score,
            "groups": groups,
            "weights": {group: dict(zip(names, row)) for group, row in zip(groups, weight_rows(best.weights))},
            "rows": rows,
            "distances": distances,
            "barriers": heights,
            "warnings": warnings_of(plan, distances, heights, rows),
            "checkpoint": str(plan.folder / STEP),
            "hugging_face": str(plan.folder / HUGGING_FACE),
        }


def _merged_config(parent: JobConfig, folder: Path, step: Path) -> JobConfig:
    """The parent's configuration in this folder."""
    config = copy(parent)
    config.job = replace(parent.job, dump_folder=str(folder))
    config.checkpoint = replace(
        parent.checkpoint, folder=CHECKPOINT, initial_load_path=str(step), initial_load_in_hf=False
    )
    return config


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
