"""Results that are expensive to make, a line of JSON each, written as soon as they are known and never made twice."""

from collections.abc import Callable, Mapping
from json import dumps, loads
from pathlib import Path
from typing import Any

from mobilellm_pro.json_lines import append_record, read_records


class LineLog:
    """A file of JSON objects, each found again by some of its keys.

    Args:
        path: the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = list(read_records(path)) if path.is_file() else []

    def recall(self, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The record with these keys, made and written where there is none.

        Args:
            key: what a record is found by, JSON values.
            make: gives the rest of it; JSON values.

        Raises:
            ValueError: a number that JSON has no word for (NaN).
        """
        for record in self.records:
            if all(name in record and record[name] == value for name, value in key.items()):
                return record
        text = dumps({**key, **make()}, allow_nan=False)
        record = loads(text)  # what another start will read
        append_record(self.path, record)
        self.records.append(record)
        return record
