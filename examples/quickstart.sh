#!/usr/bin/env bash
# From a clone to a trained model in minutes, on the CPU: installs into .venv, trains a tokenizer on the Python standard
# library's sources, turns them into a corpus, trains a tiny Ring mixture-of-experts on it, and makes a report.
#
#   bash examples/quickstart.sh [RUN_FOLDER]        (default: runs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
export PYTHONWARNINGS=ignore

run="${1:-runs/quickstart}"
if [ -e "$run" ]; then
    echo "error: $run is there already; name another folder: bash examples/quickstart.sh runs/again" >&2
    exit 2
fi
mkdir -p "$run"

_say "1/4 training a tokenizer on the standard library's sources"
"$PYTHON" tools/train_tokenizer.py --builtin-corpus --max-mb 4 --vocab-size 2048 --output "$run/tokenizer.model"

_say "2/4 writing the corpus"
"$PYTHON" tools/preprocess_data.py --builtin-corpus --max-mb 4 --append-eod \
    --tokenizer-model "$run/tokenizer.model" --output-prefix "$run/corpus"

_say "3/4 training a 1.6M-parameter Ring mixture-of-experts"
"$PYTHON" examples/pretrain_ring.py --config examples/tiny/pretrain.toml \
    --data-path "$run/corpus" --tokenizer-model "$run/tokenizer.model" \
    --save "$run/checkpoints" --load "$run/checkpoints" --metrics-file "$run/metrics.jsonl"

_say "4/4 report"
"$PYTHON" tools/report.py "$run" --out "$run/report.html"
"$PYTHON" - "$run" <<'PY'
import sys
from pathlib import Path

from megatron_ring.report.console import print_summary

run = Path(sys.argv[1])
python = Path(sys.executable).relative_to(Path.cwd()) if Path(sys.executable).is_relative_to(Path.cwd()) else "python"
print_summary(
    run,
    files=[
        ("report", run / "report.html"),
        ("picture", run / "loss.png"),
        ("metrics", run / "metrics.jsonl"),
        ("checkpoints", run / "checkpoints"),
    ],
    next_commands=[
        ("train it further", f"{python} examples/pretrain_ring.py --config {run}/config.toml --train-iters 600"),
        ("see the plan of Ring-lite itself on 64 GPUs", f"{python} examples/pretrain_ring.py "
         "--config examples/ring_lite/pretrain.toml --dry-run --world-size 64"),
        ("every setting", f"{python} examples/pretrain_ring.py --help"),
        ("pass the tests", "bash tests/run.sh"),
    ],
)
PY
