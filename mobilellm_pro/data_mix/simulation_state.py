"""What an interrupted simulation goes on from: one `.npz` file, replaced as a whole.

It holds arrays, and in words what they depend on. A simulation with other settings or pools is refused with the names
of what differs, because a curve of two halves that do not belong together would look like any other.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mobilellm_pro.atomic_file import replacement

_IDENTITY = "identity"


def write_state(path: Path, identity: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the file as a whole.

    Args:
        path: ends in .npz; its folder is made if need be.
        identity: what the arrays depend on: name and value.
        arrays: by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{_IDENTITY: np.array(json.dumps(dict(identity))), **arrays})


def read_state(path: Path, identity: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The arrays of the file, by name.

    Raises:
        ValueError: the file is damaged, or made for another identity; says what differs.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        found = json.loads(str(arrays.pop(_IDENTITY)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged ({error}): delete it, the simulation then begins again") from None
    for key in [*identity, *(key for key in found if key not in identity)]:
        if found.get(key) != identity.get(key):
            raise ValueError(
                f"{path}: holds a simulation with {key} = {found.get(key)}, this one has {key} = {identity.get(key)}: "
                "delete it to begin again, or go on with what it was begun with"
            )
    return arrays
