"""Hugging Face datasets, streamed by name: what there is to read of one, and the rows of one data shard.

`datasets` is imported when the first one is opened: the import takes seconds, and most corpora come from files. A
local folder of the same layout works in place of a name. What can go wrong (no network, a gated dataset, an unknown
name or subset, a loading script) surfaces as exceptions of half a dozen packages, so all of them become one ValueError
here that names the dataset and the cure.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilellm_pro.data.dataset_config import DatasetConfig
from mobilellm_pro.data.source import Source

HUB_FILE_PREFIX = "hf://"


def hub_sources(dataset: DatasetConfig) -> list[Source]:
    """One source per data shard of the streaming dataset, or per file when `hub_files` is set.

    Raises:
        ValueError: a dataset cannot be opened, or no file matches.
    """
    found: list[Source] = []
    for name in dataset.source:
        if dataset.hub_files:
            found += _repository_files(dataset, name)
            continue
        count = _open(dataset, name).num_shards
        label = "/".join(part for part in (name, dataset.subset, dataset.hub_split) if part)
        found += [Source(f"{label}, shard {i} of {count}", None, None, i, count, name) for i in range(count)]
    return found


def hub_records(dataset: DatasetConfig, source: Source) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of one data shard, each with its place for error messages.

    Raises:
        ValueError: the dataset cannot be opened or read, or has another number of shards than when it was listed.
    """
    data = _open(dataset, source.hub_name)
    if data.num_shards != source.num_shards:
        raise ValueError(
            f"{source.name}: the dataset now has {data.num_shards} shards, so it was published anew after it was "
            "listed: delete the corpus and prepare it again"
        )
    rows, number = iter(data.shard(num_shards=source.num_shards, index=source.shard)), 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _problem(dataset, source.hub_name, f"{source.name}, record {number}", error) from error
        yield row, f"{source.name}, record {number}"


def _open(dataset: DatasetConfig, name: str) -> Any:
    """The streaming dataset (`datasets.IterableDataset`)."""
    try:
        import datasets

        return datasets.load_dataset(name, dataset.subset or None, split=dataset.hub_split, streaming=True)
    except Exception as error:  # of `datasets`, `huggingface_hub`, `httpx`, `fsspec` and `pyarrow`
        raise _problem(dataset, name, f"hub dataset {name!r}", error) from error


def _repository_files(dataset: DatasetConfig, name: str) -> list[Source]:
    """The files that match `hub_files`, in the order of patterns and names."""
    if Path(name).is_dir():
        paths = [path for pattern in dataset.hub_files for path in sorted(Path(name).glob(pattern))]
        found = [Source(str(path), path, path.stat().st_size) for path in dict.fromkeys(paths)]
    else:
        try:
            from huggingface_hub import HfFileSystem

            files = HfFileSystem()
            listed: dict[str, dict[str, Any]] = {}
            for pattern in dataset.hub_files:
                matches: Any = files.glob(f"datasets/{name}/{pattern}", detail=True)
                listed |= dict(sorted(matches.items()))
        except Exception as error:
            raise _problem(dataset, name, f"hub dataset {name!r}", error) from error
        found = [Source(HUB_FILE_PREFIX + path, None, info.get("size")) for path, info in listed.items()]
    if not found:
        raise ValueError(
            f"hub dataset {name!r}: no file matches {list(dataset.hub_files)}: compare hub_files with the files of the "
            "dataset on the Hub"
        )
    return found


def _problem(dataset: DatasetConfig, name: str, place: str, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return ValueError(
        f"{place}: cannot be read (subset {dataset.subset!r}, hub_split {dataset.hub_split!r}; {reason}): check name, "
        "subset and network; a gated dataset needs its terms accepted and `hf auth login`; a dataset with a loading "
        f'script needs hub_files; or download {name} and set format = "parquet" or "jsonl"'
    )
