"""What the README tells a user to type exists."""

import re
from pathlib import Path

import pytest

from mobilellm_pro.__main__ import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:bash|sh|)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines() if line.strip() and line.strip()[0] != "#"]


def test_both_commands_come_first() -> None:
    assert COMMANDS[0].startswith("bash launch/quickstart.sh") and COMMANDS[1].startswith("bash launch/test.sh")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_it_names_exists(command: str) -> None:
    for path in re.findall(r"(?:launch|train_configs|tests|benchmarks|mobilellm_pro)/[\w./-]+\w", command):
        assert (ROOT / path).exists(), path
    for verb in re.findall(r"(?:^|\s)mobilellm-pro ([a-z-]+)|-m mobilellm_pro ([a-z-]+)", command):
        assert "".join(verb) in VERBS, command


def test_files_of_the_map_exist() -> None:
    for path in re.findall(r"`((?:launch|train_configs|tests|benchmarks|mobilellm_pro)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
