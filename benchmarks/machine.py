"""What benchmarks share: a description of the machine, their sections on the command line and in a file, memory.

Importing it puts the repository on the path, since references and baselines are those of the tests.
"""

import argparse
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from scipy.stats import t as student_t

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.training.run_folder import commit, processor_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
MIB = 2**20
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def describe(packages: list[str], threads: int | None = None) -> list[str]:
    """Lines of Markdown: command, commit, processor, threads in use, versions of those packages that are installed."""
    device = f", {torch.cuda.get_device_name()}" if GPU else ""
    used = f", {threads} threads" if threads else ""
    versions = {x.metadata["Name"].lower().replace("_", "-"): x.version for x in metadata.distributions()}
    return [
        f"Command: `python {shlex.join(sys.argv)}`, commit {_short(commit())}",
        "",
        f"Machine: {processor_name()}, {os.cpu_count()} CPUs{used}{device}, {platform.platform()}, "
        f"Python {platform.python_version()}",
        "",
        "Versions: " + ", ".join(f"{x} {versions[x]}" for x in packages if x in versions),
    ]


def _short(commit_of_tree: str | None) -> str:
    """The beginning of a commit's name, with the + of a changed tree."""
    whole = commit_of_tree or "unknown"
    return whole[:12] + "+" * whole.endswith("+")


def section_parser(text: str | None, sections: Iterable[str]) -> argparse.ArgumentParser:
    """The command line of a benchmark of several sections: which of them, and where to write."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(sections), default=list(sections))
    parser.add_argument("--write", type=Path, help="Markdown file")
    return parser


def write_sections(head: list[str], sections: Mapping[str, Callable[[], list[str]]], path: Path | None) -> None:
    """Runs one section after another and prints each; the file has those that are finished.

    Args:
        head: lines above all sections.
        sections: name -> what gives its lines.
        path: of the file, if there is to be one.
    """
    lines = list(head)
    print("\n".join(lines), flush=True)
    for name, run in sections.items():
        begin = time.perf_counter()
        section = ["", f"## {name}", "", *run()]
        section += ["", f"({time.perf_counter() - begin:.0f} s, load average after it {os.getloadavg()[0]:.1f})"]
        print("\n".join(section), flush=True)
        lines += section
        if path:
            write_atomically(path, "\n".join(lines) + "\n")


def in_folder(section: Callable[[Path], list[str]]) -> list[str]:
    """Runs a section with an empty folder that is removed after it."""
    with tempfile.TemporaryDirectory() as folder:
        return section(Path(folder))


def synchronize() -> None:
    """Waits for the device."""
    if GPU:
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median of several runs after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def most_resident(job: subprocess.Popen) -> tuple[int, int]:
    """Waits for a job: (most bytes of all its processes together, how many they were then), sampled every 50 ms."""
    most = (0, 0)
    while job.poll() is None:
        sizes = [size for pid in descendants(job.pid) if (size := proportional_bytes(pid))]
        most = max(most, (sum(sizes), len(sizes)))
        time.sleep(0.05)
    return most


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [child for word in children.read_text().split() for child in descendants(int(word))]
        except OSError:  # it has ended
            continue
    return found


def proportional_bytes(pid: int) -> int:
    """Resident memory, of pages that processes share a part; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(low, middle, high) of the geometric mean of at least two ratios: 95 %, by Student's t of their logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    middle, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    reach = float(student_t.ppf(0.975, len(logs) - 1)) * error
    return math.exp(middle - reach), math.exp(middle), math.exp(middle + reach)
