"""Whether a commit made the training step slower: two commits of this repository on one machine, in turns.

    python benchmarks/guard.py main HEAD                       # ratio of step times, with a 95 % interval
    python benchmarks/guard.py main HEAD --way kl-cached --size 100m --fail-above 1.03

Each commit is checked out beside the other, writes its own data and trains in a process of its own, under this
checkout's benchmark and in its environment; both models lie in memory at once, a GPU's too. They take turns of three
steps, the first of which does not count. A turn gives one ratio, of the means of its steps; the interval is that of
their geometric mean, by Student's t of the logarithms. With `--fail-above` the exit status is 1 where the whole
interval lies above the ratio.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from machine import ROOT, interval
from tqdm import tqdm
from train_step import TURN, WAYS, Trainer, write_world


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--way", choices=WAYS, default="ce")
    parser.add_argument("--size", choices=("debug", "100m", "1b"), default="debug")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--fail-above", type=float)
    arguments = parser.parse_args()
    if arguments.turns < 2:
        parser.error("--turns: one turn has no interval; expected at least 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the checkouts are removed
    steps = (arguments.turns + 1) * TURN
    job = replace(WAYS[arguments.way], flavor=arguments.size, seq_len=arguments.seq_len, steps=steps)
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        roots = {Path(name) / "before": arguments.before, Path(name) / "after": arguments.after}
        for root, commit in roots.items():
            opened.callback(remove, root)
            checkout(commit, root)
        commits: dict[Trainer, str] = {}
        for root, commit in roots.items():
            world, folder = root.with_name(f"world_{root.name}"), root.with_name(f"run_{root.name}")
            try:
                write_world([job], world, root)
            except subprocess.CalledProcessError:
                sys.exit(f"error: {commit} has not all that this checkout's benchmark needs of package and tests")
            commits[opened.enter_context(Trainer(job, world, folder, root))] = commit
        ratios = []
        for turn in tqdm(range(arguments.turns + 1), desc="turns"):
            means = []
            for trainer in commits if turn % 2 else reversed(commits):  # neither always comes after the other
                try:
                    steps = [trainer.ask("step")["seconds"] for _ in range(TURN)]
                except RuntimeError as error:
                    sys.exit(f"error: {commits[trainer]} stopped:\n{error}")
                means.append(statistics.mean(steps[1:]))
            if not turn % 2:
                means.reverse()
            if turn:
                ratios.append(means[1] / means[0])
    low, middle, high = interval(ratios)
    print(
        f"{job.name}, {arguments.size}, {arguments.seq_len} tokens: a step of {arguments.after} takes {middle:.3f} of"
    )
    print(f"one of {arguments.before} (95 %: {low:.3f} to {high:.3f}, {len(ratios)} turns)")
    sys.exit(arguments.fail_above is not None and low > arguments.fail_above)


def checkout(commit: str, folder: Path) -> None:
    """A commit's files; git says where there is no such commit."""
    if subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(folder), commit], cwd=ROOT).returncode:
        sys.exit(f"error: git cannot check out {commit}; name commits of {ROOT}")


def remove(folder: Path) -> None:
    """The files and git's note of them."""
    subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=False)


if __name__ == "__main__":
    main()
