#!/usr/bin/env bash
# One training job on this machine, or this node's part of one on several; in a SLURM job, on all of its nodes.
#
#     bash launch/train.sh train_configs/mobilellm_pro_1b/1_language.toml [--section.key value ...]
#
# NPROC   processes on this node (default: the number of GPUs, or 1)
# --profile  leaves a trace of every tenth step in the run's folder (profile_traces/, for ui.perfetto.dev) and, on a GPU,
#            what its memory holds (memory_snapshot/, for pytorch.org/memory_viz)
# NNODES, NODE_RANK, RENDEZVOUS=host:port   for several nodes; the same RENDEZVOUS everywhere
#
# In a SLURM job, but not in a step of one, it starts itself on NNODES nodes (default: all of the job) by srun; what
# runs there already is a step.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Replaces this process by srun, which runs this script once on each node. The steps of trainings that run side by side,
# as the proxies of a data mix, share the nodes (--overlap); each has its own port, and its own name for the case that
# two meet at one.
exec_on_nodes() {
    command -v srun >/dev/null || environment_fail "SLURM_JOB_ID is set, but there is no srun; unset it to run here"
    export NNODES="${NNODES:-$SLURM_JOB_NUM_NODES}"
    export RENDEZVOUS_ID="$SLURM_JOB_ID.$$"
    if ((NNODES > 1)) && [[ -z "${RENDEZVOUS:-}" ]]; then
        local nodes port
        nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
        port="$(python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])")"
        export RENDEZVOUS="${nodes%%$'\n'*}:$port"
    fi
    # A step has all that its job has of a node, GPUs too; --cpu-bind=none keeps its one task from being bound to a core.
    exec srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --overlap --cpu-bind=none \
        --kill-on-bad-exit=1 --label bash launch/train.sh "$@"
}

[[ -z "${SLURM_JOB_ID:-}" || -n "${SLURM_STEP_ID:-}" ]] || exec_on_nodes "$@"

gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
nproc="${NPROC:-$((gpus > 0 ? gpus : 1))}"
words=()
for word in "$@"; do
    case "$word" in
    --profile)
        words+=(--profiling.enable_profiling)
        ((gpus == 0)) || words+=(--profiling.enable_memory_snapshot)
        ;;
    *) words+=("$word") ;;
    esac
done

# What a good run needs and torchrun does not set; whatever is set already stays.
# torchrun would set one thread a process; on a CPU job the processes should share all cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c "import os; print(max(1, len(os.sched_getaffinity(0)) // $nproc))")}"
# Variable sequence layouts fragment the allocator's fixed segments.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# Kernels of collectives go before those of the models, which otherwise fill the GPU and make every rank wait.
export TORCH_NCCL_HIGH_PRIORITY="${TORCH_NCCL_HIGH_PRIORITY:-1}"
exec python launch/torchrun.py --nproc_per_node="$nproc" --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --rdzv_backend=c10d --rdzv_endpoint="${RENDEZVOUS:-localhost:0}" --rdzv_id="${RENDEZVOUS_ID:-none}" \
    --local-ranks-filter="${LOG_RANKS:-0}" --role=rank --tee=3 -m mobilellm_pro train "${words[@]}"
