#!/usr/bin/env bash
# The oldest versions that setup.py admits (constraints-oldest.txt) with Python 3.12, in an environment of their own,
# .venv-oldest, on a copy of the code in it: the rooms of kernels, model and rl, what reads or draws with other packages,
# every launch of a training step compiled for sm_90 and sm_100, and tiny runs of pre-training and C3PO by the launchers.
# Under 8 minutes, of which the installation (5 GB where only torch's CUDA build can be had) takes about three.
#
#   bash tests/oldest.sh           part of tests/run.sh --all
#   RING_PYTHON312=... bash tests/oldest.sh
#
# Where there is no Python 3.12, or the versions cannot be installed, it says so in a line and ends with exit code 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
TORCH_VERSION="$(sed -n 's/^torch==//p' constraints-oldest.txt)"
folder="$_root/.venv-oldest"
PYTHON="$folder/bin/python"

not_tested() { # REASON
    echo "note: $1: the oldest versions are NOT tested"
    exit 0
}

is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

python_312() {
    local candidate
    for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
        if is_312 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# copy_code: into the environment, with the C++ kernels that were built for it. The checkout's own are another torch's,
# perhaps under the same name
copy_code() {
    rm -rf "$folder/src" && mkdir "$folder/src" || return 2
    tar -c --exclude=__pycache__ --exclude='*.so' --exclude='*.egg-info' .github ./*.md ./*.txt ./*.lock LICENSE \
        MANIFEST.in setup.py pyproject.toml csrc examples megatron_ring tests tools | tar -x -C "$folder/src" || return 2
    find "$folder" -maxdepth 1 -name '_C*.so' -exec cp {} "$folder/src/megatron_ring/" \;
}

# install: the locks' packages, but those of requirements-oldest.lock in place of the newer ones
install() {
    local names
    rm -rf "$folder" || return 2
    _new_venv "$base" "$folder" || return 2
    names="$(sed -n 's/==.*//p' requirements-oldest.lock | paste -sd '|')"
    awk -v names="^($names)==" '/^[a-z0-9]/ { skip = $0 ~ names } !skip' requirements.lock >"$folder/run.lock" || return 2
    _pip_hashed "$folder/run.lock" requirements-dev.lock requirements-oldest.lock || return 2
    _install_torch --no-deps || return 2
    copy_code || return 2
    MEGATRON_RING_EXT="$native" _pip --no-deps --no-build-isolation -e "$folder/src" || return 2
    find "$folder/src/megatron_ring" -name '_C*.so' -exec cp {} "$folder/" \; && touch "$stamp"
}

if [ -n "${RING_PYTHON312:-}" ]; then
    base="$RING_PYTHON312"
    is_312 "$base" || {
        echo "error: RING_PYTHON312=$base is no Python 3.12 that runs; name one, or unset it" >&2
        exit 2
    }
else
    base="$(python_312)" || not_tested "no Python 3.12 here (name one with RING_PYTHON312)"
fi
native=1
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || native=0

out="$(mktemp -d)"
first=
# what runs beside goes with this, also where it was stopped
trap '[ -z "$first" ] || kill -TERM -- "-$first" 2>/dev/null; rm -rf "$out"' EXIT
trap 'exit 130' INT TERM
exec 9>"$_root/.venv-oldest.lock"
flock -n 9 || {
    _say "another run of tests/oldest.sh is under way in this checkout; waiting for its end"
    flock -w 3600 9 || not_tested "another run has held $_root/.venv-oldest.lock for an hour"
}
stamp="$folder/.ready-$native-$(_fingerprint)"
if [ ! -e "$stamp" ] || ! is_312 "$PYTHON"; then
    _say "the oldest versions, in an environment of their own with $("$base" --version)"
    install 2>"$out/why" || {
        rm -rf "$folder"
        why="$(grep -i '^error' "$out/why" | tail -n 1 || true)"
        [ -n "$why" ] || why="$(tail -n 1 "$out/why")"
        not_tested "${why#error: }"
    }
fi
copy_code
cd "$folder/src"

export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
[ "$native" = 1 ] || echo "note: no C++ compiler here: the C++ kernels are NOT tested with torch $TORCH_VERSION"
"$PYTHON" -c '
import numpy, torch, triton
print("oldest: torch", torch.__version__, "Triton", triton.__version__, "numpy", numpy.__version__)'
# what setup.py asks for is what was installed
"$PYTHON" -m pip --disable-pip-version-check check

checkpoints=(tests/checkpoint/test_{checkpointer,rng,convert_files,safetensors_header}.py)
rooms() { # NAME WORD...: tests of the default suite, their output in a file
    local name="$1"
    shift
    "$PYTHON" -m pytest -q -p no:cacheprovider "$@" >"$out/$name" 2>&1
}
beside() { # what runs beside model and rl
    rooms kernels -m "not slow and not all" tests/kernels
    rooms launches tests/kernels/test_launches.py -k "step and 100"
    rooms static tests/kernels/test_static.py -k "compiles_within_its_gates and 100"
    rooms files -m "not slow and not all" tests/data tests/report "${checkpoints[@]}"
    PYTHON="$PYTHON" RING_GPU_CHECK=tiny bash tools/gpu_check.sh "$out/check" same >"$out/runs" 2>&1
}
status=0
# a group of its own, which can be ended whole
set -m
beside </dev/null &
first=$!
set +m
rooms model-rl -m "not slow and not all" tests/model tests/rl || status=1
wait "$first" || status=1
first=
for each in kernels launches static files runs model-rl; do
    if [ -e "$out/$each" ]; then
        if [ "$status" -eq 0 ]; then tail -n 1 "$out/$each" | sed "s/^/oldest: $each: /"; else cat "$out/$each"; fi
    fi
done
exit "$status"
