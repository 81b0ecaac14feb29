"""Imports point down: every room may use the rooms below it, never its neighbours or those above.

Read from the syntax trees, imports inside functions included. Also here: every module can be imported without the
optional packages, and rooms that use torchtitan prepare it first.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mobilellm_pro"
# config stands below model: the model's flavors read the configuration, never the other way round.
FLOORS = {
    "atomic_file": -1,
    "file_lock": -1,
    "parent_death": -1,
    "static_page": -1,
    "json_lines": -1,
    "repeated_names": -1,
    "toml_text": -1,
    "losses": 0,
    "quantization": 0,
    "merging": 0,
    "data_mix": 0,
    "data": 0,
    "config": 1,
    "model": 2,
    "training": 3,
    "convert": 3,
    "evaluation": 4,
    "pipeline": 5,
    "__main__": 6,
}
TORCHTITAN_ROOMS = {"config", "model", "training", "convert"}
OPTIONAL = ("transformers", "lm_eval", "torchao", "executorch", "llama_models", "mergekit", "matplotlib")
OPTIONAL += ("pytest", "hypothesis", "wandb")
ONLY_WITH = {
    "mobilellm_pro.losses.triton_rows": "triton",
    "mobilellm_pro.evaluation.harness_model": "lm_eval",
    "mobilellm_pro.evaluation.tasks.bfcl": "lm_eval",
    "mobilellm_pro.evaluation.tasks.local_files": "lm_eval",
    "mobilellm_pro.evaluation.tasks.rewriting": "lm_eval",
}
"""Modules that exist for an optional package, and that nothing imports without it."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports of a file; `from a import b` gives `a.b`, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    room = room_of(path)
    names = list(imported_names(ast.parse(path.read_text())))
    used = {name.split(".")[1] for name in names if name.startswith("mobilellm_pro.")} & FLOORS.keys()
    if room == "__init__":
        assert not used, "importing the package imports no room"
        return
    assert room in FLOORS, f"{room} has no floor: add it to FLOORS"
    for other in used - {room}:
        assert FLOORS[other] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"
    if room not in TORCHTITAN_ROOMS:
        assert not [name for name in names if name.split(".")[0] == "torchtitan"], f"torchtitan is not for {room}"


@pytest.mark.parametrize("room", sorted(TORCHTITAN_ROOMS - {"config"}))
def test_rooms_of_torchtitan_prepare_it_first(room: str):
    """Whichever module of the room is imported first, its `__init__` runs before and imports the configuration room."""
    modules = [path for path in MODULES if room_of(path) == room]
    names = [name for path in modules for name in imported_names(ast.parse(path.read_text()))]
    if not any(name.startswith("torchtitan") for name in names):
        pytest.skip(f"{room} does not use torchtitan yet")
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    first = next(imported_names(tree), "")
    assert first.startswith("mobilellm_pro.config"), f"{room}/__init__.py must start with `import mobilellm_pro.config`"


def test_file_names_are_unique_and_say_something():
    names = [path.name for path in MODULES if path.name not in ("__init__.py", "__main__.py")]
    assert sorted(set(names)) == sorted(names), "two files of one name"
    assert not {name.removesuffix(".py") for name in names} & {"utils", "helpers", "common", "manager"}


def test_every_module_imports_without_optional_packages():
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES]
    here = {module for module, package in ONLY_WITH.items() if package not in OPTIONAL and find_spec(package)}
    names = [name for name in names if name not in ONLY_WITH or name in here]
    program = f"""
import importlib, sys, traceback
sys.modules |= dict.fromkeys({OPTIONAL!r})  # None there makes an import fail
failed = False
for name in {names!r}:
    try:
        importlib.import_module(name.removesuffix(".__init__"))
    except Exception:
        failed = True
        print(name, traceback.format_exc(limit=-3), sep="\\n")
sys.exit(failed)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
