#!/usr/bin/env bash
# The oldest versions that setup.py admits (constraints-oldest.txt) with Python 3.12, in an environment of their own,
# .venv-oldest: the rooms of kernels, model and rl, every launch of a training step compiled for sm_90 and sm_100, and
# tiny runs of pre-training and C3PO by the launchers. Under 8 minutes, of which the installation (5 GB where only
# torch's CUDA build can be had) takes about three.
#
#   bash tests/oldest.sh           part of tests/run.sh --all
#   RING_PYTHON312=... bash tests/oldest.sh
#
# Where there is no Python 3.12, or the versions cannot be installed, it says so and ends with exit code 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
TORCH_VERSION="$(sed -n 's/^torch==//p' constraints-oldest.txt)"
PYTHON="$_root/.venv-oldest/bin/python"

python_312() {
    local candidate
    for candidate in "${RING_PYTHON312:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# _install_oldest: the locks' packages, but those of requirements-oldest.lock in place of the newer ones
_install_oldest() {
    local folder="$_root/.venv-oldest" names
    names="$(sed -n 's/==.*//p' requirements-oldest.lock | paste -sd '|')"
    awk -v names="^($names)==" '/^[a-z0-9]/ { skip = $0 ~ names } !skip' requirements.lock >"$folder/run.lock"
    _pip_hashed "$folder/run.lock" requirements-dev.lock requirements-oldest.lock || return 2
    _install_torch --no-deps || return 2
    _pip --no-deps --no-build-isolation -e .
}

base="$(python_312)" || {
    echo "note: no Python 3.12 here (name one with RING_PYTHON312): the oldest versions are NOT tested"
    exit 0
}
stamp=".venv-oldest/.ready-$(_fingerprint)"
if [ ! -e "$stamp" ]; then
    _say "the oldest versions, in an environment of their own with $("$base" --version)"
    rm -rf .venv-oldest
    "$base" -m venv .venv-oldest
    _install_oldest || {
        echo "note: the oldest versions could not be installed: they are NOT tested"
        exit 0
    }
    touch "$stamp"
fi

out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$PYTHON" -c '
import numpy, torch, triton
print("oldest: torch", torch.__version__, "Triton", triton.__version__, "numpy", numpy.__version__)'
# what setup.py asks for is what was installed
"$PYTHON" -m pip --disable-pip-version-check check

rooms() { # NAME WORD...: tests of the default suite, their output in a file
    local name="$1"
    shift
    "$PYTHON" -m pytest -q -p no:cacheprovider "$@" >"$out/$name" 2>&1
}
kernels() {
    rooms kernels -m "not slow and not all" tests/kernels
    rooms launches tests/kernels/test_launches.py -k "step and 100"
    rooms static tests/kernels/test_static.py -k "compiles_within_its_gates and 100"
    PYTHON="$PYTHON" RING_GPU_CHECK=tiny bash tools/gpu_check.sh "$out/check" same >"$out/runs" 2>&1
}
kernels &
first=$!
status=0
rooms model-rl -m "not slow and not all" tests/model tests/rl || status=1
wait "$first" || status=1
for each in kernels launches static runs model-rl; do
    if [ -e "$out/$each" ]; then
        if [ "$status" -eq 0 ]; then tail -n 1 "$out/$each" | sed "s/^/oldest: $each: /"; else cat "$out/$each"; fi
    fi
done
exit "$status"
