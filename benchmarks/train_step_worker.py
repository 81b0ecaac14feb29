"""One way to train, in a process of its own for train_step.py: builds a trainer and does a step when it is told to.

    python benchmarks/train_step_worker.py '[{"way": "ours", "objective": "ce", ...}, ...]' WORLD
    python benchmarks/train_step_worker.py '[{"way": "ours", "objective": "ce", ...}]' WORLD FOLDER

Without a folder it writes what the jobs read. Else it reads words from standard input: `size` is answered by a line of
JSON with numbers of parameters and operations, `step` with the seconds of one step, `peak` with the most memory since
it was asked last, `shares N` with the shares of the ranges named in the code in N profiled steps (our trainer only),
`end` by nothing.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from train_step_conversation import Conversation
from train_step_jobs import Job, build_titan, build_trainer, run_transformers, write_world

from mobilellm_pro.model.student import FLAVORS


def main() -> None:
    """Command line: jobs as JSON, a folder with data, a folder for a job's own files."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # trainers print
    jobs, world = [Job(**job) for job in json.loads(sys.argv[1])], Path(sys.argv[2])
    if not sys.argv[3:]:
        write_world(jobs, world)
        return
    (job,), folder = jobs, Path(sys.argv[3])
    folder.mkdir(exist_ok=job.teacher == "write")  # then it is that of the job that reads
    build = {"ours": build_trainer, "torchtitan": build_titan}
    conversation = Conversation(replies)
    if job.teacher == "cached":
        write_hidden_states(job, world, folder)
    if job.way == "transformers":
        run_transformers(job, world, folder, conversation)  # its loop calls back
        return
    if job.teacher == "write":
        # What the teacher says does not depend on the student that asks, so the least one does.
        least = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "global_layers": (0,)}
        FLAVORS[job.flavor] = replace(FLAVORS[job.flavor], **least)
        build_trainer(job, world, folder).train()
        return
    trainer = build[job.way](job, world, folder)
    batches = trainer.batch_generator(trainer.dataloader)
    while conversation.waits(trainer.model_parts[0], operations(trainer, job)):
        trainer.step += 1
        trainer.train_step(batches)
        conversation.answer()


def write_hidden_states(job: Job, world: Path, folder: Path) -> None:
    """The cache that the job reads: from another process, since it takes a trainer, and there is one in each."""
    writer = replace(job, teacher="write", compile=False)
    words = json.dumps([asdict(writer)]), str(world), str(folder)
    subprocess.run([sys.executable, "-W", "ignore", __file__, *words], check=True, stdin=subprocess.DEVNULL)


def operations(trainer: Any, job: Job) -> float:
    """Of a token's training; torchtitan's model counted as ours is, with attention to all before in every layer."""
    if job.way == "ours":
        return trainer.metrics_processor.num_flops_per_token
    (model,), args = trainer.model_parts, FLAVORS[job.flavor]
    multiplied = sum(p.numel() for p in model.parameters()) - model.tok_embeddings.weight.numel()
    attention = 12 * args.num_attention_heads * args.head_dim * job.seq_len / 2
    return 6 * multiplied + args.num_hidden_layers * attention


if __name__ == "__main__":
    main()
