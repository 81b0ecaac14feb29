"""Stands in for `launch/train.sh` where a test is about the runner: same words, same files, no model, no imports.

A step sleeps; a checkpoint is a copy of a real one. What it leaves depends on its steps and on what it began with, and
not on how often it was stopped, as a training's.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path


def main() -> int:
    """One training; the environment says how it behaves."""
    words = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[2:] if word.startswith("--"))
    folder = Path(words["job.dump_folder"])
    steps = int(words["training.steps"])
    print(f"training of {folder.name} with {os.environ.get('NPROC')} processes", flush=True)
    if folder.name == os.environ.get("STAND_IN_FAILS"):
        print("out of luck", file=sys.stderr)
        return 3
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.json"
    done = json.loads(state.read_text()) if state.is_file() else [words.get("checkpoint.initial_load_path", "nothing")]
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    for step in range(len(done), steps + 1):
        time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0.001")))
        done.append(f"step {step}")
        temporary = state.with_suffix(".tmp")
        temporary.write_text(json.dumps(done))
        temporary.replace(state)
        with (folder / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"kind": "train", "step": step, "loss": 1 / step}) + "\n")
        if (folder / "STOP").exists() or (step == 2 and folder.name == os.environ.get("STAND_IN_STOPS")):
            (folder / "STOP").unlink(missing_ok=True)
            return 0
    checkpoint = folder / f"checkpoint/step-{steps}"
    if not checkpoint.exists():
        shutil.copytree(os.environ["STAND_IN_CHECKPOINT"], checkpoint)
    (folder / "DONE").write_text(json.dumps({"steps": steps, "checkpoint": str(checkpoint)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
