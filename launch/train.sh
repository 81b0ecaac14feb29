#!/usr/bin/env bash
# One training job on this machine, or this node's part of one on several.
#
#     bash launch/train.sh train_configs/mobilellm_pro_1b/1_language.toml [--section.key value ...]
#
# NPROC   processes on this node (default: the number of GPUs, or 1)
# NNODES, NODE_RANK, RENDEZVOUS=host:port   for several nodes; the same RENDEZVOUS everywhere
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
nproc="${NPROC:-$((gpus > 0 ? gpus : 1))}"
# torchrun would set one thread a process; on a CPU job the processes should share all cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c "import os; print(max(1, len(os.sched_getaffinity(0)) // $nproc))")}"
# Variable sequence layouts fragment the allocator's fixed segments.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec torchrun --nproc_per_node="$nproc" --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --rdzv_backend=c10d --rdzv_endpoint="${RENDEZVOUS:-localhost:0}" \
    --local-ranks-filter="${LOG_RANKS:-0}" --role=rank --tee=3 -m mobilellm_pro train "$@"
