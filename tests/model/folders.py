"""Hugging Face folders for tests."""

import json
from pathlib import Path
from typing import Any


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
