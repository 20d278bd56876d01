#!/usr/bin/env bash
# Sets up .venv and passes the tests.
#
#   bash tests/run.sh           the default suite (11 minutes on 2 quiet cores)
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
# tiny tensors: a second thread waits, and burns a core that another test would use
export OMP_NUM_THREADS=1
if [ -z "$chosen" ]; then
    _say "the sandbox for model-written code"
    bash tools/setup_sandbox.sh || echo "note: no sandbox here; its tests are skipped and say so"
fi

out="$(mktemp -d)"
beside=
trap '[ -z "$beside" ] || kill -TERM -- "-$beside" 2>/dev/null; rm -rf "$out"' EXIT
trap 'exit 130' INT TERM
# half of the work; what is in no list is in the other half. The expensive proofs are mostly in these four
half=(tests/parallel tests/e2e tests/checkpoint tests/kernels)
[ -n "$all" ] || half+=(tests/stages tests/tools tests/train)

both_halves() { # WORD...: two at a time, for most tests use one core; the one that runs beside is heard at its end
    local status=0
    set -m
    "$PYTHON" -m pytest -q "$@" "${half[@]}" >"$out/half" 2>&1 </dev/null &
    beside=$!
    set +m
    "$PYTHON" -m pytest -q -p no:cacheprovider "$@" tests "${half[@]/#/--ignore=}" || status=$?
    wait "$beside" || status=$?
    beside=
    _say "${half[*]}"
    cat "$out/half"
    return "$status"
}

if [ -n "$all" ]; then
    _say "vLLM, in an environment of its own, for the converter's proofs"
    bash tools/setup_vllm.sh || echo "note: vLLM could not be installed; its tests are skipped and say so"
    _say "style and types"
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m pyright
    _say "every test"
    status=0
    # further words choose tests of this environment
    if [ ${#words[@]} -gt 0 ]; then
        "$PYTHON" -m pytest -q "${words[@]}" || status=$?
    else
        both_halves || status=$?
        bash tests/oldest.sh || status=1
    fi
    exit "$status"
fi
_say "the default suite"
if [ ${#words[@]} -gt 0 ]; then
    "$PYTHON" -m pytest -q -m "not slow and not all" "${words[@]}"
else
    both_halves -m "not slow and not all"
fi
