#!/usr/bin/env bash
# Every benchmark that this machine can run, one after the other: tools/benchmark/all.sh [PEER_PYTHON]
# PEER_PYTHON is an interpreter that has transformers and trl; without it our side is timed alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
export PYTHONWARNINGS=ignore
peer=()
[ $# -gt 0 ] && peer=(--peer-python "$1")

_run() {
    printf '\033[1m==> %s\033[0m\n' "$*"
    "$python" "tools/benchmark/$1.py" "${@:2}" 2>/dev/null || failed+=("$1")
}

failed=()
for name in kernels moe_layer step static budget sandbox; do
    _run "$name"
done
# what these two measure is a CPU's
MEGATRON_RING_DEVICE=cpu _run extension
MEGATRON_RING_DEVICE=cpu _run stand_in
_run generate "${peer[@]}"
_run rl_step "${peer[@]}"
echo "not run here: convert (72 GB of disk; --scratch FOLDER), c3po_grpo (--start a quickstart's folder)"
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
