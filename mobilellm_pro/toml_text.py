"""Words of TOML, for files that are written and not read."""

import json


def quoted(text: str) -> str:
    """A string as TOML has it: JSON's escapes, but no pairs of surrogates, and the delete character escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
