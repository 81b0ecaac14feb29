"""What the steps of the verb `mix` leave in its folder, and how a later start knows that it is still theirs.

STEP_settings.json what simulate and calibrate were begun with; another start must agree with it
simulation.npz     state of the simulation; curves.npz: its result
influence/         with simulation.export: the influence of every sample
domains.toml       the domains, as a job that proxies are tested with
proxies/NNN/       mixture.toml, the run, held_out.json, log.txt
calibration.json   mixtures and bits per byte of all finished proxies
fit.json           how well regressors predict a mixture that they have not seen
weights.toml       [[data.datasets]] tables for a job's `data.mix`; weights.json: how they came about
mix_report.html    all of it on one page; mix_report.json, *.png: the same for programs
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.data.claimed_file import agree_on_settings
from mobilellm_pro.data.shards import Corpus

SETTINGS, SIMULATION, CURVES, CALIBRATION = "settings.json", "simulation.npz", "curves.npz", "calibration.json"
FIT, WEIGHTS, WEIGHTS_RECORD = "fit.json", "weights.toml", "weights.json"


def agree(folder: Path, step: str, settings: Mapping[str, Any], *, begin: bool = True) -> None:
    """Compares with what a step was begun with, or notes what it is begun with.

    Args:
        folder: of all steps; made if need be.
        step: "simulate" or "calibrate".
        settings: name -> JSON value.
        begin: whether it begins now; else nothing is noted.

    Raises:
        ValueError: they differ; names each difference.
    """
    said = f"{step} was begun with other settings"
    cure = "choose another output, remove the folder, or go on with its settings"
    agree_on_settings(folder / f"{step}_{SETTINGS}", settings, said=said, cure=cure, begin=begin)


def content(corpus: Corpus) -> str:
    """What a corpus holds, in a few words that change with any token."""
    return f"{corpus.num_tokens} tokens #{corpus.content}"


def digest(*parts: Any) -> str:
    """Sixteen hex digits of JSON values and bytes: what a file was made of."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()[:16]


def read_if_made_of(path: Path, made_of: str) -> dict[str, Any] | None:
    """The JSON of a step that was made of just this; None where it is to be made."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    return record if record.get("made_of") == made_of else None


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record; refuses what JSON has no word for (NaN)."""
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name and renames; a file that holds this already stays untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        write_atomically(path, text)
