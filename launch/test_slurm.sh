#!/usr/bin/env bash
# The sbatch files of this folder on a real Slurm: a pipeline that is stopped by its time limit, queued again and
# finished, and specialists as an array, with the same weights in the end as by one undisturbed command.
#
#     bash launch/test_slurm.sh             some minutes on two cores that nobody else uses
#     KEEP=1 bash launch/test_slurm.sh      leaves its folder with all logs
#
# The cluster is one of its own (launch/slurm_test_cluster.sh), and its daemons end with this script. Debian's slurm-wlm
# and munge are installed if they are missing. Without root or apt-get it says so and ends with status 77.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PATH="$PATH:/usr/sbin"
unset "${!SLURM_@}" "${!SBATCH_@}" NNODES NPROC RENDEZVOUS TRAIN_COMMAND # it may be run in somebody's job
export OMP_NUM_THREADS=1

folder="$(mktemp -d "${TMPDIR:-/tmp}/test_slurm.XXXXXX")"
chmod 711 "$folder" # munged wants its socket's folder passable for all
reference=""

skip() {
    echo "skipped: $*"
    exit 77
}

step() { printf '\n== %3d s  %s\n' "$SECONDS" "$*"; }

fail() {
    echo "FAILED after $SECONDS s: $*" >&2
    tail -v -n 25 "$folder"/jobs/*.out "$folder"/{reference,slurmctld}.log >&2 || true
    exit 1
}

source launch/slurm_test_cluster.sh

clean_up() {
    local status=$?
    trap - EXIT INT TERM
    if [[ -n "$reference" ]]; then # it stops with a checkpoint
        pkill -TERM --parent "$reference" || true
        wait "$reference" 2>/dev/null || true
    fi
    stop_cluster
    if [[ -n "${KEEP:-}" ]]; then echo "kept: $folder"; else rm -rf "$folder"; fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# SECONDS WHAT COMMAND...: until the command succeeds.
wait_for() {
    local limit=$((SECONDS + $1)) what="$2"
    shift 2
    until "$@"; do
        ((SECONDS < limit)) || fail "no $what in time"
        sleep 0.3
    done
}

# FOLDER: the debug configuration with little text and few steps; two specialists begin with phase 1.
write_pipeline() {
    local name
    mkdir -p "$1/configs"
    for name in common datasets 0_teacher 1_language; do
        sed "s#outputs/debug#$1#" "train_configs/debug/$name.toml" >"$1/configs/$name.toml"
    done
    python - "$1/text" <<'PYTHON'
import gzip
import json
import sys
import sysconfig
from pathlib import Path

folder, texts = Path(sys.argv[1]), []
for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
    text = path.read_text(errors="replace")
    texts += [text[begin : begin + 3000] for begin in range(0, len(text), 3000)]
folder.mkdir()
for index, name in enumerate(("encyclopedia", "code", "questions", "mathematics", "manuals")):
    with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
        for number, text in enumerate(texts[index * 200 : index * 200 + 200]):
            file.write(json.dumps({"id": f"{name}-{number}", "text": text}) + "\n")
PYTHON
    {
        printf 'output = "%s/out"\n' "$1"
        phase 0_prepare prepare 'config = "datasets.toml"'
        train_phase 0_teacher 30 'config = "0_teacher.toml"' 'needs = ["0_prepare"]'
        phase 0_teacher_hugging_face convert 'initial_checkpoint = "phase:0_teacher"'
        train_phase 1_language 80 'config = "1_language.toml"' "$teacher"
        for name in code questions; do
            train_phase "3_specialist_$name" 40 'config = "1_language.toml"' "$teacher" "overrides.data.seed = 3" \
                'initial_checkpoint = "phase:1_language"'
        done
    } >"$1/configs/pipeline.toml"
}
teacher='overrides.teacher.path = "phase:0_teacher_hugging_face"'

# NAME KIND LINE...
phase() {
    printf '\n[[phase]]\nname = "%s"\nkind = "%s"\n' "$1" "$2"
    printf '%s\n' "${@:3}"
}

# NAME STEPS LINE...: checkpoints only at the end, and where a stop is asked for.
train_phase() {
    phase "$1" train "${@:3}" "overrides.training.steps = $2" "overrides.checkpoint.interval = 1000" \
        "overrides.training.seq_len = 128" "overrides.training.local_batch_size = 2" \
        "overrides.training.global_batch_size = 4" "overrides.lr_scheduler.warmup_steps = 4" \
        "overrides.metrics.log_freq = 1" "overrides.validation.enable = false"
}

to_language=(0_prepare 0_teacher 0_teacher_hugging_face 1_language)
specialists=(3_specialist_code 3_specialist_questions)

# The same by one command for each number of processes, but for the specialist that nothing happens to.
run_reference() {
    local pipeline="$folder/reference/configs/pipeline.toml"
    NPROC=2 mobilellm-pro run "$pipeline" --only "${to_language[@]}" &&
        NPROC=1 mobilellm-pro run "$pipeline" --only "${specialists[1]}"
}

submit() {
    NPROC=1 sbatch --parsable --gpus-per-node=0 --output="$folder/jobs/%x-%j.out" "$@"
}

# JOB KEY: of `scontrol show job`.
value_of() { scontrol show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1; }

steps_of() { cat "$folder/slurm/out/$1/metrics.jsonl" 2>/dev/null | wc -l; }

asked=()
# JOB PHASE STEPS: asks the job for a stop, once, when the phase has done so many steps.
ask_for_stop() {
    [[ " ${asked[*]-} " != *" $1 "* ]] && (($(steps_of "$2") >= $3)) || return 0
    step "job $1: SIGUSR1 to its batch script, $2 has done $(steps_of "$2") steps"
    scancel --signal=USR1 --batch "$1"
    asked+=("$1")
}

declare -A hurried=()
# JOB [WORD...]: a job that was queued again waits two minutes; Slurm has no setting for that. A few seconds it needs:
# the credential of an earlier start is revoked up to the second of its end, and what starts in that second is killed.
# Words change the job too.
start_soon() {
    local job="$1" restarts
    restarts="$(value_of "$job" Restarts)"
    [[ -z "${hurried["$job.$restarts"]-}" && "$(value_of "$job" Reason)" == BeginTime ]] || return 0
    scontrol update JobId="$job" StartTime=now+5 "${@:2}" && hurried["$job.$restarts"]=yes
}

# JOB: whether it is over; fails where it did not end well.
is_over() {
    local state
    state="$(value_of "$1" JobState)"
    case "$state" in
        COMPLETED) return 0 ;;
        CANCELLED | FAILED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY | BOOT_FAIL | DEADLINE | PREEMPTED)
            fail "job $1 ended as $state"
            ;;
        *) return 1 ;;
    esac
}

pipeline_is_over() {
    local restarts
    restarts="$(value_of "$pipeline_job" Restarts)"
    start_soon "$pipeline_job" TimeLimit="$((restarts + 1))" # so that a loaded machine comes to an end too
    # In the middle of a training, and not in the first start: that one is to end for its time limit.
    ((restarts == 0)) || ask_for_stop "$pipeline_job" 1_language 3
    is_over "$pipeline_job"
}

array_is_over() {
    local task
    ask_for_stop "${array_job}_1" 3_specialist_questions 3
    for task in 0 1; do
        start_soon "${array_job}_$task"
        is_over "${array_job}_$task" || return 1
    done
}

install_slurm
step "text and configurations"
write_pipeline "$folder/reference"
write_pipeline "$folder/slurm"
step "the undisturbed run, beside all that follows"
# The status goes to a file: bash does not remember it over the many commands that follow.
{ run_reference >"$folder/reference.log" 2>&1 && echo 0 || echo 1; } >"$folder/reference.status" &
reference=$!
step "cluster"
start_cluster
mkdir "$folder/jobs"
configs="$folder/slurm/configs"

step "pipeline on two nodes with a time limit of a minute, and an array of two specialists that waits for it"
# Slurm looks every half minute at jobs whose signal is due within that time: here in the first half minute.
pipeline_job="$(submit --nodes=2 --time=1 --signal=B:USR1@30 \
    launch/pipeline.sbatch "$configs/pipeline.toml" --only "${to_language[@]}")"
array_job="$(submit --nodes=1 --dependency="afterok:$pipeline_job" --array=0-1 \
    launch/specialists.sbatch "$configs/pipeline.toml" "${specialists[@]}")"
wait_for 1800 "end of the pipeline's job" pipeline_is_over
step "job $pipeline_job is over after $(value_of "$pipeline_job" Restarts) restarts"

step "the array"
wait_for 900 "end of the array" array_is_over
step "the array is over"

step "the undisturbed run"
wait_for 900 "end of the undisturbed run" test -s "$folder/reference.status"
reference=""
[[ "$(<"$folder/reference.status")" == 0 ]] || fail "the undisturbed run ended with an error"

step "what came of it"
python -W ignore - "$folder" "$(value_of "$pipeline_job" Restarts)" "$(value_of "${array_job}_0" Restarts)" \
    "$(value_of "${array_job}_1" Restarts)" "$(value_of "$pipeline_job" EndTime)" \
    "$(value_of "${array_job}_0" StartTime)" <<'PYTHON' || fail "not as expected"
import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint: weights and the optimizer's."""
    items = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
    found = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in items
        if isinstance(item, TensorStorageMetadata)
    }
    dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    return found


folder, (pipeline, *tasks) = Path(sys.argv[1]), map(int, sys.argv[2:5])
problems = []
for path in sorted((folder / "slurm/out/ledger").glob("*.json")):
    record = json.loads(path.read_text())
    print(f"{record['name']:24} {record['state']}, {record['starts']} starts")
    if record["state"] != "done":
        problems.append(f"{record['name']}: {record['state']}")
    undisturbed = folder / "reference/out/ledger" / path.name
    if record["kind"] != "train" or not undisturbed.exists():
        continue
    expected = json.loads(undisturbed.read_text())
    if (expected["state"], expected["starts"]) != ("done", 1):
        problems.append(f"{record['name']}: undisturbed {expected['state']} after {expected['starts']} starts")
    ours, theirs = tensors(Path(record["product"])), tensors(Path(expected["product"]))
    differing = [name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name])]
    print(f"{'':24} {len(ours)} tensors of weights and optimizer, {len(differing)} differ from the undisturbed run's")
    if differing or not ours:
        problems.append(f"{record['name']}: {differing[:3]} differ")
    if record["name"] in ("1_language", "3_specialist_questions") and record["starts"] < 2:
        problems.append(f"{record['name']}: was not stopped")
print(f"restarts: pipeline {pipeline}, tasks of the array {tasks}")
if pipeline < 2:
    problems.append(f"the pipeline restarted {pipeline} times: expected one for its time limit and one for a signal")
if tasks[0] != 0 or tasks[1] < 1:
    problems.append(f"tasks of the array restarted {tasks} times: expected only the second, which was signalled")
if sys.argv[6] < sys.argv[5]:
    problems.append(f"the array began at {sys.argv[6]}, before the end of the pipeline's job at {sys.argv[5]}")
sys.exit("\n".join(problems) or 0)
PYTHON
step "passed"
