"""Datasets of evaluation tasks from a local folder, in the files of the Hub's repositories.

A task of lm-eval names a dataset of the Hub, `allenai/openbookqa` say. With a data folder it is read from
`FOLDER/allenai/openbookqa`, which holds that repository's files (parquet, JSON lines or CSV, and the README.md whose
head says which are whose), as they come with

    hf download --repo-type dataset allenai/openbookqa --local-dir FOLDER/allenai/openbookqa

So a cluster without a network, and the tests, go the same way as everybody else.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DataMissing(ValueError):
    """A dataset that is not in the data folder."""


@contextmanager
def local_datasets(folder: str | Path | None) -> Iterator[None]:
    """Within it, the harness reads datasets from a folder; from the Hub, if there is none.

    Every task, few-shot example and haystack of lm-eval comes from `datasets.load_dataset`, so that is what changes.

    Args:
        folder: holds a folder of each dataset, under the dataset's name.

    Raises:
        FileNotFoundError: no such folder.
        DataMissing: (the function, when called) the folder has no such dataset; names it and how to get it.
    """
    if not folder:
        yield
        return
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of evaluation data")
    import datasets

    from_hub = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        local = Path(folder) / path
        if not local.is_dir():
            raise DataMissing(
                f"{local}: no such folder, for the dataset {path}{f' ({name})' if name else ''}; get its files with\n"
                f"  hf download --repo-type dataset {path} --local-dir {local}\n"
                "on a machine with a network, or leave the task out"
            )
        # Its usual cache knows a local dataset by its last name, and would give that of another folder.
        return from_hub(str(local), name, **{**options, "cache_dir": cache})

    load.folder = folder  # type: ignore[attr-defined]  # for tasks of files that `datasets` cannot hold
    datasets.load_dataset = load
    with tempfile.TemporaryDirectory() as cache:
        try:
            yield
        finally:
            datasets.load_dataset = from_hub
