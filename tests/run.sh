#!/usr/bin/env bash
# Sets up .venv and passes the tests.
#
#   bash tests/run.sh           the default suite (under 20 minutes on 2 cores)
#   bash tests/run.sh --all     the expensive proofs too; installs what they need and names what it had to skip
#   bash tests/run.sh -k word   further words go to pytest
#
# The list of planted kernel faults takes longer than all else together: python -m pytest tests/kernels/test_mutations.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh dev

all=""
words=()
for word in "$@"; do
    if [ "$word" = "--all" ]; then all=1; else words+=("$word"); fi
done

export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
if [ -n "$all" ]; then
    if [ "${RING_VLLM:-0}" = 1 ]; then
        _say "installing vLLM in an environment of its own for the converter's proofs"
        bash tools/setup_vllm.sh || echo "note: vLLM could not be installed; its tests are skipped and say so"
    else
        echo "note: not run here without RING_VLLM=1: the comparison with vLLM (an environment of 3.6 GB)"
    fi
    _say "style and types"
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m pyright
    _say "every test"
    echo "note: not run here: every planted kernel fault (python -m pytest tests/kernels/test_mutations.py)"
    "$PYTHON" -m pytest -q --deselect tests/kernels/test_mutations.py::test_every_fault_fails_two_tests "${words[@]}"
else
    _say "the default suite"
    "$PYTHON" -m pytest -q -m "not slow and not all" "${words[@]}"
fi
