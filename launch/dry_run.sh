#!/usr/bin/env bash
# What the two long phases of the 1B run need on 64, 256 and 1,024 ranks: memory, operations, bytes moved, time. One CPU
# process, no GPU, no data, no weights; the teacher is Llama 4 Scout's architecture.
#
#     bash launch/dry_run.sh                                 tables
#     OUT=plans bash launch/dry_run.sh --hardware h200       and plans/<phase>_<ranks>.json
#
# Words given to the script are options of `mobilellm-pro plan`. A batch divides only some numbers of ranks, so each
# number comes with the overrides that it needs; they are printed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

configs=train_configs/mobilellm_pro_1b

# PHASE RANKS [WORD...]: words are overrides of the configuration, and options of this plan.
plan() {
    local phase="$1" ranks="$2" save=()
    shift 2
    if [[ -n "${OUT:-}" ]]; then
        mkdir -p "$OUT"
        save=(--json "$OUT/${phase}_$ranks.json")
    fi
    printf '\n== %s on %s ranks%s\n\n' "$phase" "$ranks" "${*:+, with $*}"
    mobilellm-pro plan "$configs/$phase.toml" --world-size "$ranks" --teacher scout ${save[@]+"${save[@]}"} "$@"
}

# The file's 1,088 rows are 17 for each of 64 ranks. 256 and 1,024 ranks divide 1,024 rows, 4 % less than the report's
# 1,068: 2.10M tokens a step.
plan 1_language 64 "$@"
plan 1_language 256 --training.local_batch_size 4 --training.global_batch_size 1024 "$@"
plan 1_language 1024 --training.local_batch_size 1 --training.global_batch_size 1024 "$@"

# Two rows a step, whatever the number of ranks: more ranks share a row. 1,284 is the mean length of the document that a
# token of the mix stands in, by the report's table.
plan 2_context 64 --document-tokens 1284 "$@"
plan 2_context 256 --parallelism.context_parallel_degree 128 --document-tokens 1284 "$@"
plan 2_context 1024 --parallelism.context_parallel_degree 512 --document-tokens 1284 "$@"
