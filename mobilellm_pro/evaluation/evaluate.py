"""A checkpoint through a suite of lm-eval-harness tasks: the `evaluate` verb.

    mobilellm-pro evaluate train_configs/suites/base.toml outputs/debug/3_merge outputs/debug/evaluation
    torchrun --nproc-per-node 8 -m mobilellm_pro evaluate ...

The harness makes the questions and judges the answers; `harness_model` answers. A finished task is not run again, and
of one that was stopped, answers that were given stay.
"""

import importlib.metadata
import json
import os
import shutil
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mobilellm_pro.data.claimed_file import agree_on_settings
from mobilellm_pro.evaluation.comparison import compare_evaluations
from mobilellm_pro.evaluation.evaluation_folder import DONE, RESULTS, SETTINGS, TABLE, task_file, write_results
from mobilellm_pro.evaluation.ranks import join_ranks, wait_for_ranks, world_size
from mobilellm_pro.evaluation.suite import Suite, check_suite, load_suite
from mobilellm_pro.evaluation.suite_run import SuiteRun
from mobilellm_pro.model.checkpoint import find_checkpoint
from mobilellm_pro.training.run_folder import describe_environment


def evaluate(
    suite: str,
    checkpoint: str,
    output: str,
    *,
    data: str | None = None,
    limit: int | None = None,
    only: list[str] | None = None,
    compare: list[str] | None = None,
    allow_code: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    device: str | None = None,
    quantize: Literal["cpu", "accelerator"] | None = None,
    tree_tokens: int = 2048,
    batch: int = 8,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Run a checkpoint through a suite of lm-eval-harness tasks, and print a table with standard errors.

    Started again with the same output, it goes on where it stopped; under torchrun the ranks share the documents.

    Args:
        suite: TOML file that names tasks and metrics, as train_configs/suites/base.toml.
        checkpoint: a run folder, one step-N folder, a Hugging Face folder, a folder of packed four-bit integers, or
            an exported ExecuTorch program's.
        output: folder to write to.
        data: local folder of datasets, in the Hub's files; default the suite's, or the Hub.
        limit: documents of each task, the first ones, 0 for all; default the suite's.
        only: tasks of the suite; default the suite's, or all.
        compare: folders of finished evaluations to put beside this one, with significance of the differences.
        allow_code: run programs that the model writes, in a limited subprocess.
        dtype: of the weights; default bfloat16 on a GPU, float32 on a CPU.
        device: default this process' GPU, where there is one.
        quantize: round a student in full precision to the few bits of this scheme first.
        tree_tokens: of many questions and answers at a time in the model.
        batch: prompts of equal length that are continued at a time.
        overwrite: forget what is in the output folder.

    Returns:
        What results.json holds, on the first rank.

    Raises:
        ConfigError: everything that is wrong with the suite.
        FileNotFoundError: no such checkpoint, tokenizer or data folder.
        ValueError: unknown tasks or metrics, data that is missing, code that is not allowed, or an output folder with
            other settings.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("this needs lm-eval, which the extra `eval` installs: pip install 'mobilellm-pro[eval]'")
    chosen = _chosen(suite, data=data, limit=limit, only=only)
    folder, begin, number = Path(output), time.monotonic(), join_ranks()
    if overwrite and number == 0:
        shutil.rmtree(folder, ignore_errors=True)
    wait_for_ranks()
    settings = _settings(chosen, checkpoint, {"dtype": dtype, "quantize": quantize})
    _agree(folder, settings, begin=False)
    if not (folder / DONE).is_file():
        from mobilellm_pro.evaluation.harness_model import CheckpointModel  # imports lm-eval

        run = SuiteRun(chosen, suite, folder, allow_code=allow_code)
        model = CheckpointModel(checkpoint, max_length=chosen.max_length, tree_tokens=tree_tokens, batch_size=batch,
                                dtype=dtype, device=device, quantize=quantize)  # fmt: skip
        run.check_data(model.max_length)
        _agree(folder, settings, begin=True)
        todo = [column for column in chosen.columns if not task_file(folder, column.task).is_file()]
        wait_for_ranks()  # every one has seen the same files
        # A rank's answers alone are not what all ranks would go on from.
        answers = folder / "responses" if world_size() == 1 else None
        run.evaluate(todo, model, folder, answers=answers)
        if number == 0:
            write_results(folder, chosen, _record(settings, begin))
    if number:
        return None
    print((folder / TABLE).read_text(), end="")
    if compare:
        compare_evaluations([folder, *compare], folder / "comparison")
    return json.loads((folder / RESULTS).read_text())


def _chosen(path: str, **given: Any) -> Suite:
    """A suite's file, with what the command line says otherwise."""
    suite = replace(load_suite(path), **{key: value for key, value in given.items() if value is not None})
    check_suite(suite, path)
    if suite.data and not Path(suite.data).is_dir():
        raise FileNotFoundError(f"{suite.data}: no such folder of evaluation data; correct data of {path}, or --data")
    return suite


def _agree(folder: Path, settings: dict[str, Any], *, begin: bool) -> None:
    """Notes the settings in the folder, if the evaluation begins; an error if others are noted there."""
    said, cure = "the scores in this folder were made with other settings", "choose another folder, or --overwrite"
    agree_on_settings(folder / SETTINGS, settings, said=said, cure=cure, begin=begin)


def _settings(suite: Suite, checkpoint: str, options: dict[str, Any]) -> dict[str, Any]:
    """What decides about the scores."""
    kept = {key: value for key, value in asdict(suite).items() if key not in ("base", "column", "average", "only")}
    kept["suite"] = kept.pop("name")
    columns = [[column.task, column.shots] for column in suite.columns]  # names and metrics may be chosen afterwards
    options |= {"dtype": options["dtype"] or "default", "lm-eval": importlib.metadata.version("lm-eval")}
    return {"checkpoint": checkpoint, "step": _step(checkpoint), **kept, **options, "columns": columns}


def _step(checkpoint: str) -> str | None:
    """Which of a run's checkpoints that is, since a run folder means its newest; None: no run's."""
    try:
        return find_checkpoint(checkpoint).step.name
    except FileNotFoundError:
        return None


def _record(settings: dict[str, Any], begin: float) -> dict[str, Any]:
    environment = describe_environment(int(os.environ.get("WORLD_SIZE", "1")))
    environment["versions"] |= {name: importlib.metadata.version(name) for name in ("lm-eval", "datasets")}
    kept = {key: value for key, value in settings.items() if key != "columns"}
    kept["limit"] = kept["limit"] or None
    return {**kept, "seconds": round(time.monotonic() - begin, 1), "environment": environment}
