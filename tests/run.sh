#!/usr/bin/env bash
# Sets up .venv and passes the tests.
#
#   bash tests/run.sh           the default suite (under 15 minutes on 2 quiet cores)
#   bash tests/run.sh --all     the expensive proofs too; installs what they need and names what it had to skip
#   bash tests/run.sh -k word   further words go to pytest
#   bash tests/run.sh tests/config/test_load.py      only these; the sandbox is used where it is there and not installed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
setup_env dev

all=""
words=()
chosen=""
for word in "$@"; do
    if [ "$word" = "--all" ]; then all=1; else words+=("$word"); fi
    case "$word" in tests/*) chosen=1 ;; esac
done

export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
if [ -z "$chosen" ]; then
    _say "the sandbox for model-written code"
    bash tools/setup_sandbox.sh || echo "note: no sandbox here; its tests are skipped and say so"
fi
if [ -n "$all" ]; then
    _say "vLLM, in an environment of its own, for the converter's proofs"
    bash tools/setup_vllm.sh || echo "note: vLLM could not be installed; its tests are skipped and say so"
    _say "style and types"
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m pyright
    _say "every test"
    status=0
    "$PYTHON" -m pytest -q "${words[@]}" || status=$?
    # further words choose tests of this environment
    [ ${#words[@]} -gt 0 ] || bash tests/oldest.sh || status=1
    exit "$status"
else
    _say "the default suite"
    "$PYTHON" -m pytest -q -m "not slow and not all" "${words[@]}"
fi
