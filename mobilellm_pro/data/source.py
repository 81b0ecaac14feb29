"""What a corpus is read from: sources, each read as a whole, and the documents in them."""

from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """The unit that is read, and resumed, as a whole.

    Attributes:
        name: the path, or for a Hugging Face dataset which part of it; unique within a dataset.
        path: file, or folder for the format "folder"; None for a part of a Hugging Face dataset.
        num_bytes: size on disk (all files of a folder), None where nobody tells.
        shard, num_shards: which of how many data shards of the streaming dataset; num_shards is 0 for a file.
        hub_name: the Hugging Face dataset that the shard belongs to.
    """

    name: str
    path: Path | None
    num_bytes: int | None
    shard: int = 0
    num_shards: int = 0
    hub_name: str = ""


class Document(NamedTuple):
    """One document.

    Attributes:
        id: names it in messages.
        text: all of it.
        language: what the language column says, "" without one.
        position: bytes of the source consumed so far (compressed ones of a packed file), 0 where nobody tells.
    """

    id: str
    text: str
    language: str = ""
    position: int = 0
