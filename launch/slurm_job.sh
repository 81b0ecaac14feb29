# Sourced by the sbatch files of this folder: what a job of a pipeline needs on its first node, and `run_or_requeue`.
#
# The runner (`mobilellm-pro run`) works on the job's first node. Each training it starts is launch/train.sh, which
# spreads itself by srun: one torchrun on each node.

# COMMAND [WORD...]: runs it to its end. SIGUSR1, which Slurm sends some time before the time limit, is passed on: the
# training saves a checkpoint and ends. If that is what ended the command, the job goes back into the queue, and what
# runs then is this very job again. SIGTERM goes to all processes of a job anyway, and who sends it ends the job
# (scancel, the limit itself) or queues it again (preemption, an administrator): nothing that this script should do.
#
# Ends the script: with the command's status, or 0 where the job was queued again.
run_or_requeue() {
    local status word
    for word in "$@"; do
        [[ "$word" != --from && "$word" != --from=* ]] || {
            echo "error: --from in a job that queues itself again would begin anew each time; run it once by hand:" \
                "mobilellm-pro run PIPELINE --from NAME, stop it, then submit without it" >&2
            exit 2
        }
    done
    [[ "$wanted" != USR1 ]] || requeue # while the environment was being made
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST: $*"
    "$@" &
    command_pid=$!
    [[ "$wanted" != USR1 || -n "$passed_on" ]] || pass_on # it came between the lines above
    while true; do # a signal ends `wait` before the command has ended
        signalled=""
        wait "$command_pid" && status=0 || status=$?
        [[ -n "$signalled" ]] || break
    done
    case "$wanted $status" in
        # 75: stopped as asked. 138: 128 and the number of SIGUSR1, which met the command before it could handle it.
        "USR1 75" | "USR1 138") requeue ;;
        *) exit "$status" ;;
    esac
}

on_signal() {
    echo "SIG$1 after $SECONDS s"
    signalled="$1"
    [[ "$wanted" != "$1" ]] || return 0 # a second one would be taken as a wish to kill
    wanted="$1"
    [[ "$1" != USR1 ]] || pass_on
}

pass_on() {
    [[ -n "$command_pid" ]] || return 0
    passed_on=yes
    kill -USR1 "$command_pid" 2>/dev/null || true
}

requeue() {
    local job="$SLURM_JOB_ID"
    # The number of the array's last task is that of the array: it would queue all of its tasks again.
    [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    echo "job $job goes back into the queue"
    scontrol requeue "$job" || {
        echo "error: Slurm does not queue job $job again (scontrol show config: JobRequeue); submit it anew" >&2
        exit 75
    }
    exit 0
}

[[ -n "${SLURM_JOB_ID:-}" ]] || {
    echo "error: this is no SLURM job; submit with: sbatch $0" >&2
    exit 2
}
command_pid="" wanted="" signalled="" passed_on=""
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export NNODES="${NNODES:-$SLURM_JOB_NUM_NODES}" # the runner checks trainings for NNODES times NPROC processes
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"         # NCCL says nothing of its errors otherwise
