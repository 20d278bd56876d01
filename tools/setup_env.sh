# Makes .venv in the project's root ready: torch, Megatron-Core, this package with its C++ kernels.
#   source tools/setup_env.sh && setup_env [EXTRA]      (EXTRA: dev)
# Leaves $PYTHON pointing at the environment's interpreter. Runs again only when what it installs has changed.

_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$_root/.venv/bin/python"

_say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

_base_python() {
    for candidate in "${RING_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11-3.13 found; install one or name it in RING_PYTHON" >&2
    return 1
}

_fingerprint() {
    (cd "$_root" && cat setup.py pyproject.toml constraints*.txt csrc/* megatron_ring/__init__.py |
        sha256sum | cut -c1-16)
}

_install() {  # _install EXTRA
    local extra="$1"
    local pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check) constraints="constraints-cpu.txt"
    local torch="torch==2.13.0" index="https://download.pytorch.org/whl/cpu"
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        constraints="constraints.txt"
        _say "installing torch for CUDA"
        "${pip[@]}" "$torch"
    elif ! "$PYTHON" -c 'import torch' 2>/dev/null; then
        # the CPU build is 200 MB where the default index holds several GB of CUDA libraries
        if "$PYTHON" -c "import urllib.request as r; r.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
            _say "installing torch for the CPU"
            "${pip[@]}" "$torch+cpu" --index-url "$index"
        else
            _say "installing torch (PyTorch's CPU index does not answer: taking pip's default)"
            "${pip[@]}" "$torch"
        fi
    fi
    _say "installing megatron_ring and what it needs"
    "${pip[@]}" -c "$constraints" "setuptools>=77" wheel ninja
    "${pip[@]}" -c "$constraints" --no-build-isolation -e ".${extra:+[$extra]}"
}

setup_env() {
    cd "$_root"
    local extra="${1:-}" stamp
    stamp=".venv/.ready-${extra:-run}-$(_fingerprint)"
    if [ -e "$stamp" ]; then
        return
    fi
    local base
    base="$(_base_python)" || return 2
    [ -x "$PYTHON" ] || { _say "making .venv with $($base --version)"; "$base" -m venv .venv; }
    _install "$extra"
    rm -f ".venv/.ready-${extra:-run}-"*
    touch "$stamp"
}
