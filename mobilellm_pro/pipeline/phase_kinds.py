"""What each kind of phase runs, what decides its result, and what it leaves for others.

A phase is one command with all that it needs as words: it can be copied from the log and run by hand. To add a kind:
its name in `phases.KindName`, and a line in `KINDS`.
"""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm_pro.config import JobConfig, load, resolved_toml, smallest_world_size
from mobilellm_pro.config.toml import read_toml
from mobilellm_pro.convert.export import RECORD, load_export_table
from mobilellm_pro.evaluation.evaluation_folder import RESULTS
from mobilellm_pro.evaluation.suite import load_suite
from mobilellm_pro.model.checkpoint import latest_checkpoint
from mobilellm_pro.pipeline.data_mix_folder import WEIGHTS, WEIGHTS_RECORD
from mobilellm_pro.pipeline.phases import PREFIX, Phase
from mobilellm_pro.pipeline.run_command import evaluation_program, num_processes, train_command
from mobilellm_pro.pipeline.train_job import online_evaluations
from mobilellm_pro.pipeline.varied_job import flatten, words_of
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run import is_finished

if TYPE_CHECKING:
    from mobilellm_pro.pipeline.merge_plan import MergePlan

DONE = "DONE"
_NOT_DECISIVE = ("job.dump_folder", "job.description")
Products = Mapping[str, Path]
"""Name of a phase that is done -> what it has made."""


@dataclass(frozen=True)
class Kind:
    """How phases of a kind are run."""

    command: Callable[[Phase, Products], list[str]]
    """Its words; every phase that it refers to is done."""

    settings: Callable[[Phase, Products], dict[str, Any]]
    """Flat key -> value of what decides the result; keys at their default may be left out."""

    problems: Callable[[Phase, Products], Iterator[str]]
    """What can be known to be wrong before it is started, while phases that it needs may not be done yet.

    May raise ValueError or OSError, which is a problem too."""

    product: Callable[[Phase], Path | None]
    """What it has made, once its command has ended well; None: nothing."""

    metrics: Callable[[Phase], dict[str, Any]]
    """Numbers for the ledger."""


def training_job(phase: Phase, products: Products) -> JobConfig:
    """The configuration of a training, as far as phases that it refers to are done.

    Raises:
        ConfigError: with all its problems.
    """
    assert phase.config is not None
    return load(phase.config, _training_words(phase, products))


def world_size(phase: Phase, config: JobConfig) -> int:
    """Processes of a training; the least that its degrees allow where $TRAIN_COMMAND decides."""
    return num_processes(phase.nproc) or smallest_world_size(config)


def _training_words(phase: Phase, products: Products) -> list[str]:
    overrides = dict(phase.overrides)
    for key, name in phase.references.items():
        if name in products:
            overrides[key] = str(products[name])
        else:
            del overrides[key]
    own: dict[str, Any] = {"job.dump_folder": str(phase.folder)}
    if phase.initial is not None and phase.initial in products:
        own["checkpoint.initial_load_path"] = str(products[phase.initial])
    return [*words_of(overrides), *phase.words, *words_of(own)]


def _train_command(phase: Phase, products: Products) -> list[str]:
    assert phase.config is not None
    return train_command(phase.config, _training_words(phase, products))


def _train_settings(phase: Phase, products: Products) -> dict[str, Any]:
    """Without the folder, which is where and not what; paths of other phases by the phase's name."""
    values = _flat_job(training_job(phase, products))
    values |= {key: f"{PREFIX}{name}" for key, name in phase.references.items() if key in values}
    if phase.initial:
        values["checkpoint.initial_load_path"] = f"{PREFIX}{phase.initial}"
    return {key: value for key, value in values.items() if key not in _NOT_DECISIVE}


def _flat_job(config: JobConfig) -> dict[str, Any]:
    defaults = flatten(tomllib.loads(resolved_toml(JobConfig())))
    values = flatten(tomllib.loads(resolved_toml(config)))
    return {key: value for key, value in values.items() if key not in defaults or defaults[key] != value}


def _train_problems(phase: Phase, products: Products) -> Iterator[str]:
    config = training_job(phase, products)
    if not config.checkpoint.enable:
        yield "checkpoint.enable = false: nothing would be left for other phases; set it"
    if is_finished(config):
        return
    skip = _not_there_yet(phase, products)
    evaluations = [] if config.needle.haystack and "datasets" in skip else online_evaluations(config)
    yield from problems(config, world_size(phase, config), evaluations, skip=skip)


def _not_there_yet(phase: Phase, products: Products) -> set[str]:
    """Checks of a training that have to wait: the phase before it has not made its files."""
    waiting = {name for name in phase.needs if name not in products}
    checks = {"datasets", "cache"} if waiting & set(phase.corpora) else set()
    checks |= {"teacher", "cache"} if phase.references.get("teacher.path") in waiting else set()
    return checks | ({"checkpoints"} if phase.initial in waiting else set())


def _train_product(phase: Phase) -> Path | None:
    done = phase.folder / DONE
    recorded = json.loads(done.read_text())["checkpoint"] if done.is_file() else None
    return latest_checkpoint(Path(recorded).parent) if recorded else None


def _train_metrics(phase: Phase) -> dict[str, Any]:
    return json.loads((phase.folder / DONE).read_text())


def _file(phase: Phase) -> str:
    assert phase.config is not None
    return str(phase.config)


def _file_settings(phase: Phase, products: Products) -> dict[str, Any]:
    """The keys of the phase's file, and who gives it what."""
    values = {} if phase.config is None else flatten(read_toml(phase.config, f"the file of a {phase.kind} phase"))
    given = {"initial_checkpoint": phase.initial, **{f"branches.{k}": v for k, v in phase.branches.items()}}
    values.pop("output", None)
    return values | {key: f"{PREFIX}{name}" for key, name in given.items() if name}


def _prepare_problems(phase: Phase, products: Products) -> Iterator[str]:
    from mobilellm_pro.data.dataset_config import load_datasets_config

    load_datasets_config(_file(phase))
    yield from ()


def corpora_folder(phase: Phase) -> Path | None:
    """Where a phase that prepares corpora writes them; None for other kinds, which write into their own folder."""
    return Path(read_toml(Path(_file(phase)), "corpora")["output"]) if phase.kind == "prepare" else None


def _prepare_product(phase: Phase) -> Path | None:
    """The folder of the corpora, if all of them are complete."""
    from mobilellm_pro.data.dataset_config import load_datasets_config
    from mobilellm_pro.data.manifest import FILE

    config = load_datasets_config(_file(phase))
    complete = all((config.output / dataset.name / FILE).is_file() for dataset in config.datasets)
    return config.output if complete else None


def _mix_problems(phase: Phase, products: Products) -> Iterator[str]:
    from mobilellm_pro.pipeline.data_mix_plan import load_mix_plan

    load_mix_plan(_file(phase))
    yield from ()


def _mix_settings(phase: Phase, products: Products) -> dict[str, Any]:
    from mobilellm_pro.pipeline.data_mix_plan import load_mix_plan

    return _file_settings(phase, products) | _job_settings("proxy.job", load_mix_plan(_file(phase)).base)


def _job_settings(prefix: str, config: JobConfig) -> dict[str, Any]:
    """Of the job that a phase's file names: another file, whose keys decide too."""
    flat = _flat_job(config)
    return {f"{prefix}.{key}": value for key, value in flat.items() if key not in _NOT_DECISIVE}


def _mix_metrics(phase: Phase) -> dict[str, Any]:
    return json.loads((phase.folder / WEIGHTS_RECORD).read_text())


def _merge_command(phase: Phase, products: Products) -> list[str]:
    assert phase.initial is not None
    branches = [f"{branch}={products[name]}" for branch, name in phase.branches.items()]
    words = ["--output", str(phase.folder), "--parent", str(products[phase.initial]), "--branches", *branches]
    return ["mobilellm-pro", "merge", _file(phase), *words]


def _merge_plan(phase: Phase) -> "MergePlan":
    from mobilellm_pro.pipeline.merge_plan import load_merge_plan

    branches = [f"{branch}={PREFIX}{name}" for branch, name in phase.branches.items()]
    return load_merge_plan(_file(phase), str(phase.folder), f"{PREFIX}{phase.initial}", branches)


def _merge_problems(phase: Phase, products: Products) -> Iterator[str]:
    _merge_plan(phase)
    yield from ()


def _merge_settings(phase: Phase, products: Products) -> dict[str, Any]:
    return _file_settings(phase, products) | _job_settings("job", _merge_plan(phase).job)


def _merge_metrics(phase: Phase) -> dict[str, Any]:
    return json.loads((phase.folder / "merge.json").read_text())


def _convert_command(phase: Phase, products: Products) -> list[str]:
    assert phase.initial is not None
    return ["mobilellm-pro", "convert", str(products[phase.initial]), str(phase.folder), "--overwrite"]


def _about(phase: Phase, products: Products) -> list[str]:
    """Words of a verb that takes a file, a checkpoint and a folder to write to."""
    assert phase.initial is not None
    return [_file(phase), str(products[phase.initial]), str(phase.folder)]


def _no_problems(phase: Phase, products: Products) -> Iterator[str]:
    yield from ()


def _evaluate_settings(phase: Phase, products: Products) -> dict[str, Any]:
    """With the keys of the suite that the file is based on."""
    return flatten(asdict(load_suite(_file(phase)))) | {"initial_checkpoint": f"{PREFIX}{phase.initial}"}


def _evaluate_problems(phase: Phase, products: Products) -> Iterator[str]:
    suite = load_suite(_file(phase))
    if suite.data and not Path(suite.data).is_dir():
        yield f"data = {suite.data}: no such folder; `mobilellm-pro fetch-evaluation {suite.data}` makes a small one"


def _evaluate_metrics(phase: Phase) -> dict[str, Any]:
    results = json.loads((phase.folder / RESULTS).read_text())
    return {key: results[key] for key in ("columns", "averages")}


def _export_problems(phase: Phase, products: Products) -> Iterator[str]:
    load_export_table(_file(phase))
    yield from ()


def _export_metrics(phase: Phase) -> dict[str, Any]:
    return json.loads((phase.folder / RECORD).read_text())


def _no_metrics(phase: Phase) -> dict[str, Any]:
    return {}


def _mix_product(phase: Phase) -> Path | None:
    path = phase.folder / WEIGHTS
    return path if path.is_file() else None


def _folder_with(name: str) -> Callable[[Phase], Path | None]:
    """The folder, if this file, which is written last or appears with it, is there."""

    def product(phase: Phase) -> Path | None:
        return phase.folder if (phase.folder / name).is_file() else None

    return product


KINDS: dict[str, Kind] = {
    "prepare": Kind(
        lambda phase, products: ["mobilellm-pro", "prepare", _file(phase), "--cluster"],
        _file_settings,
        _prepare_problems,
        _prepare_product,
        _no_metrics,
    ),
    "data_mix": Kind(
        lambda phase, products: ["mobilellm-pro", "mix", _file(phase), "--output", str(phase.folder)],
        _mix_settings,
        _mix_problems,
        _mix_product,
        _mix_metrics,
    ),
    "train": Kind(_train_command, _train_settings, _train_problems, _train_product, _train_metrics),
    "merge": Kind(
        _merge_command,
        _merge_settings,
        _merge_problems,
        lambda phase: latest_checkpoint(phase.folder / "checkpoint"),
        _merge_metrics,
    ),
    "convert": Kind(_convert_command, _file_settings, _no_problems, _folder_with("config.json"), _no_metrics),
    "evaluate": Kind(
        lambda phase, products: [*evaluation_program(), "evaluate", *_about(phase, products)],
        _evaluate_settings,
        _evaluate_problems,
        _folder_with(DONE),
        _evaluate_metrics,
    ),
    "export": Kind(
        lambda phase, products: ["mobilellm-pro", "export", *_about(phase, products)],
        _file_settings,
        _export_problems,
        _folder_with(DONE),
        _export_metrics,
    ),
}
"""By name, as `phases.KindName` has them."""
