"""A file that is replaced is the old one or the new one, and nothing remains beside it."""

import json
from pathlib import Path

import pytest

from mobilellm_pro.atomic_file import replacement, write_atomically


@pytest.mark.parametrize(("content", "expected"), [("größer\n", "größer\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_text_and_bytes_replace_a_file(tmp_path: Path, content: str | bytes, expected: bytes):
    path = tmp_path / "a.json"
    for _ in range(2):
        write_atomically(path, content)
        assert path.read_bytes() == expected and list(tmp_path.iterdir()) == [path]
    umask_decides = tmp_path / "plain"
    umask_decides.touch()
    assert path.stat().st_mode == umask_decides.stat().st_mode


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, b"new")
    with pytest.raises(TypeError), replacement(path) as temporary, temporary.open("w") as file:
        json.dump(["written", object()], file)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_old_file_stands_until_the_new_one_is_complete(tmp_path: Path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with replacement(path) as first, replacement(path) as second:
        assert first != second and first.parent == second.parent == tmp_path
        first.write_text("of another writer")
        second.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "of another writer" and list(tmp_path.iterdir()) == [path]
