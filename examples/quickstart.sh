#!/usr/bin/env bash
# From a clone to a reasoner in minutes, on the CPU: installs into .venv, pre-trains a tiny Ring mixture-of-experts on the
# Python standard library's sources, supervises it with the worked sums of a careful teacher and then of one who slips,
# improves it by reinforcement learning with C3PO on sums that reasoning-gym poses and judges, and makes a report.
#
#   bash examples/quickstart.sh [RUN_FOLDER]        (default: runs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
setup_env
ring="${PYTHON%/*}/ring"

run="${1:-runs/quickstart}"
if [ -e "$run" ]; then
    echo "error: $run is there already; name another folder: bash examples/quickstart.sh runs/again" >&2
    exit 2
fi
mkdir -p "$run"

# the model is so small that two processes of one thread train it faster than one of two threads
launch=("$ring")
if [ "$(nproc)" -ge 2 ]; then
    export OMP_NUM_THREADS=1
    launch=("$ring" launch --standalone --nproc-per-node 2)
fi

_stage() {  # _stage NAME FOLDER [FLAG ...]: ring NAME with its tiny settings, files in FOLDER
    local name="$1" folder="$2"
    shift 2
    "${launch[@]}" "$name" --config "examples/tiny/$name.toml" --tokenizer-model "$run/tokenizer.model" \
        --save "$folder" --load "$folder" --metrics-file "$folder/metrics.jsonl" "$@"
}

_say "1/7 training a tokenizer on the standard library's sources"
"$ring" tokenizer --builtin-corpus --max-mb 4 --vocab-size 2048 \
    --symbol '\boxed{' 'State the final answer to the following arithmetic problem:' --output "$run/tokenizer.model"

_say "2/7 writing the corpus"
"$ring" preprocess --builtin-corpus --max-mb 4 --append-eod \
    --tokenizer-model "$run/tokenizer.model" --output-prefix "$run/corpus"

_say "3/7 pre-training a 1.1M-parameter Ring mixture-of-experts"
_stage pretrain "$run/pretrain" --data-path "$run/corpus" --train-iters 200

_say "4/7 writing worked examples: a careful teacher's, and a hasty one's with a slip in three of five"
sums=(--min-terms 2 --max-terms 4 --min-digits 1 --max-digits 1)
held_out="$(sed -n 's/^eval_prompt_data = \["\(.*\)"\]/\1/p' examples/tiny/rl.toml)"
"$PYTHON" tools/make_worked_examples.py "${sums[@]}" --count 100000 --slip-share 0 --exclude "$held_out" \
    --output "$run/sums.jsonl"
"$PYTHON" tools/make_worked_examples.py "${sums[@]}" --count 40000 --seed 5 --slip-share 0.6 --exclude "$held_out" \
    --output "$run/hasty_sums.jsonl"
"$PYTHON" tools/make_worked_examples.py "${sums[@]}" --count 300 --seed 2 --slip-share 0 \
    --output "$run/sums_held_out.jsonl"

_say "5/7 supervised fine-tuning, first on the careful teacher's, then on the hasty one's"
# progress alone: the other stages show what a run says at its usual level, info
held_out_sums=(--sft-eval-data "$run/sums_held_out.jsonl" --log-level warning)
_stage sft "$run/sft_careful" --sft-data "$run/sums.jsonl" "${held_out_sums[@]}" --pretrained-checkpoint "$run/pretrain"
_stage sft "$run/sft" --sft-data "$run/hasty_sums.jsonl" "${held_out_sums[@]}" \
    --pretrained-checkpoint "$run/sft_careful" --lr 1.5e-3 --min-lr 1e-4

_say "6/7 reinforcement learning with C3PO"
_stage rl "$run/rl" --pretrained-checkpoint "$run/sft"

_say "7/7 report"
for stage in pretrain sft_careful sft rl; do
    "$ring" report "$run/$stage" --out "$run/$stage/report.html" >/dev/null
done
"$PYTHON" - "$run" "$ring" <<'PY'
import sys
from pathlib import Path

from megatron_ring.report.console import print_summary

run, ring = Path(sys.argv[1]), Path(sys.argv[2])
ring = ring.relative_to(Path.cwd()) if ring.is_relative_to(Path.cwd()) else ring
print_summary(
    run / "rl",
    files=[
        ("report", run / "rl/report.html"),
        ("earlier stages", f"{run}/pretrain, {run}/sft_careful and {run}/sft: report.html"),
        ("responses", run / "rl/samples.jsonl"),
        ("checkpoints", run / "rl"),
    ],
    next_commands=[
        ("train it further", f"{ring} rl --config {run}/rl/config.toml --train-iters 120"),
        ("C3PO beside GRPO, three seeds each", f"{ring.with_name('python')} tools/benchmark/c3po_grpo.py --start {run}"),
        ("the plan of Ring-lite itself on 64 GPUs",
         f"{ring} rl --config examples/ring_lite/rl_math.toml --dry-run --world-size 64"),
    ],
)
PY
