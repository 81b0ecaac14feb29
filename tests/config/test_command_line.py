"""Verbs: their help, their arguments, and how errors end."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_strict_loading import VALID, written

from mobilellm_pro import __main__ as command_line
from mobilellm_pro.config import load


def has_source(verb: str) -> bool:
    try:
        command_line.verb_source(command_line.VERBS[verb])
    except (LookupError, SyntaxError):
        return False
    return True


@pytest.mark.parametrize("verb", command_line.VERBS)
def test_help_is_the_docstring(verb: str, capsys: pytest.CaptureFixture[str]):
    if not has_source(verb):
        pytest.skip("not there yet")
    with pytest.raises(SystemExit) as ended:
        command_line.main([verb, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    docstring = command_line.verb_source(command_line.VERBS[verb]).docstring
    assert docstring and docstring in printed


def test_help_lists_the_verbs_and_imports_nothing_heavy():
    program = "import sys; from mobilellm_pro.__main__ import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(f"    {verb}" in result.stdout for verb in command_line.VERBS if has_source(verb))
    assert "torch" not in result.stdout.splitlines()[-1].split()


def test_show_prints_what_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, VALID)
    assert command_line.main(["show", str(path), "--training.steps", "500", "--metrics.enable_tensorboard"]) == 0
    again = load(written(tmp_path, capsys.readouterr().out, "again.toml"))
    assert again == load(path, ["--training.steps", "500", "--metrics.enable_tensorboard"])


def test_a_verb_is_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command_line.show(load(written(tmp_path, VALID)))
    assert "[training]" in capsys.readouterr().out


def test_a_users_mistake_has_no_traceback(tmp_path: Path):
    path = written(tmp_path, VALID + "[training]\nsed_len = 3")
    command = [sys.executable, "-m", "mobilellm_pro", "show", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: 1 problem in the configuration") and "Traceback" not in result.stderr
    assert "did you mean seq_len?" in result.stderr


def test_the_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("MOBILELLM_PRO_TRACEBACK", "1")
    assert command_line.main(["show", str(tmp_path / "nowhere.toml")]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_one_rank_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    assert command_line.main(["show", str(tmp_path / "nowhere.toml")]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert command_line.main(["show", str(tmp_path / "nowhere.toml")]) == 2
    assert "no such file" in capsys.readouterr().err


FAKE_VERB = '''
"""A module with a verb."""
from pathlib import Path
from typing import Literal

def act(source: str | Path, names: list[str], *, dtype: Literal["a", "b"] = "a", count: int | None = None,
        fast: bool = False, careful: bool = True, ratio: float = 0.5) -> None:
    """Act."""
'''


def test_arguments_follow_the_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "acting.py").write_text(FAKE_VERB)
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "__main__.py"))
    monkeypatch.setattr(command_line, "VERBS", {"act": "mobilellm_pro.acting:act"})
    parser = command_line.build_parser()
    words = "act here x y --dtype b --count 3 --fast --no-careful --ratio 2".split()
    assert vars(parser.parse_args(words)) == {
        "verb": "act",
        "source": Path("here"),
        "names": ["x", "y"],
        "dtype": "b",
        "count": 3,
        "fast": True,
        "careful": False,
        "ratio": 2.0,
    }
    assert vars(parser.parse_args(["act", "here", "x"])).keys() == {"verb", "source", "names"}
    with pytest.raises(SystemExit):
        parser.parse_args(["act", "here", "x", "--dtype", "c"])


class ForeignError(ValueError):
    """Not of the package."""


def test_which_errors_are_the_users():
    from mobilellm_pro.config import ConfigError

    assert command_line.is_users_mistake(ConfigError("x", []))
    assert command_line.is_users_mistake(FileNotFoundError(2, "no such file", "x"))
    for error in (KeyError("x"), RuntimeError("x"), raised(ValueError("x")), raised(ForeignError("x"))):
        assert not command_line.is_users_mistake(error)


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("mobilellm_pro.config.resolved_toml", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command_line.main(["show", str(written(tmp_path, VALID))])
