#!/usr/bin/env bash
# The whole pipeline at toy size, on a machine with nothing but Python: real text, a Llama 4 teacher, sampling weights by
# simulation, a student distilled in two phases, four specialists, their merge, training with four bits, evaluation,
# files for phones. Two CPU cores, no network but the package index.
#
#     bash launch/quickstart.sh
#
# Started again, it goes on where it stopped. Words given to the script are overrides of all trainings; with others than
# before, name another folder:   OUT=outputs/seed2 bash launch/quickstart.sh --debug.seed 2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

pipeline=train_configs/debug/pipeline.toml
out="${OUT:-outputs/debug}"

step() { printf '\n== %s\n' "$*"; }

step "text and evaluation documents, from the package index and the installed packages"
mobilellm-pro fetch-text outputs/debug/text
mobilellm-pro fetch-evaluation outputs/debug/evaluation_data

step "pipeline: $pipeline"
mobilellm-pro run "$pipeline" --output "$out" "$@"

step "a continuation from the merged student's Hugging Face folder"
mobilellm-pro generate "$out/3_merge/hugging_face" --prompt "The history of the " --max-new-tokens 60 \
    --temperature 0.7 | tee "$out/sample.txt"

step "result: bits per byte on held-out text, before the specialists, of each, and of their averages"
cat "$out/3_merge/merge.md"
step "result: scores of lm-eval-harness, of a toy: in full precision, and with four bits"
cat "$out"/5_evaluate*/results.md
step "result: files for phones, each compared with the checkpoint that it was made of"
cat "$out"/7_export_*/sizes.md
mobilellm-pro report "$pipeline" --output "$out"
cat <<END
phases               mobilellm-pro status $pipeline --output $out
report               $out/report.html
Hugging Face         $out/3_merge/hugging_face   (AutoModelForCausalLM.from_pretrained)
for phones           $out/7_export_cpu/executorch, .../packed, .../torchao
TensorBoard          tensorboard --logdir $out
sample               $out/sample.txt
total                $((SECONDS / 60)) min $((SECONDS % 60)) s
END
