# Makes .venv in the project's root ready: torch, Megatron-Core, this package with its C++ kernels.
#   source tools/setup_env.sh && setup_env [EXTRA]      (EXTRA: dev)
# Leaves $PYTHON pointing at the environment's interpreter. Runs again only when what it installs has changed.

_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$_root/.venv/bin/python"
TORCH_VERSION=2.13.0

_say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

_is_supported() {  # _is_supported PYTHON: does it run, and is it one of those that were tested?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

_base_python() {
    if [ -n "${RING_PYTHON:-}" ]; then
        _is_supported "$RING_PYTHON" && echo "$RING_PYTHON" && return
        echo "error: RING_PYTHON=$RING_PYTHON is no Python 3.11-3.13 that runs; name one, or unset it" >&2
        return 1
    fi
    for candidate in python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null && _is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11-3.13 found; install one or name it in RING_PYTHON" >&2
    return 1
}

_version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

_new_venv() {  # _new_venv PYTHON FOLDER: make it, or say in a line why not
    local log
    log="$("$1" -m venv "$2" 2>&1)" && return
    case "$log" in
        *ensurepip*) log="it has no ensurepip; Debian and Ubuntu have it in python$(_version_of "$1")-venv" ;;
    esac
    echo "error: $1 could not make $2 ($(tail -1 <<<"$log"))" >&2
    return 2
}

# _make_venv: .venv with a supported Python and pip. One that is there is used or refused, never replaced
_make_venv() {
    local base log
    if [ -L "$PYTHON" ] || [ -e "$PYTHON" ]; then
        if ! _is_supported "$PYTHON"; then
            echo "error: the Python of $_root/.venv does not run or is none of 3.11-3.13; move .venv away and" \
                "run this again" >&2
            return 2
        fi
        if [ -n "${RING_PYTHON:-}" ]; then
            base="$(_base_python)" || return 2
            if [ "$(_version_of "$base")" != "$(_version_of "$PYTHON")" ]; then
                echo "error: $_root/.venv holds Python $(_version_of "$PYTHON") and RING_PYTHON is" \
                    "$(_version_of "$base"); move .venv away, or unset RING_PYTHON" >&2
                return 2
            fi
        fi
    else
        base="$(_base_python)" || return 2
        _say "making .venv with $("$base" --version)"
        _new_venv "$base" "$_root/.venv" || return 2
    fi
    # none in an environment that was interrupted while it was made, or that another tool has made
    "$PYTHON" -m pip --version >/dev/null 2>&1 || log="$("$PYTHON" -m ensurepip 2>&1)" || {
        echo "error: $_root/.venv has no pip, and it cannot be put there ($(tail -1 <<<"$log")); move .venv away and" \
            "run this again" >&2
        return 2
    }
}

_fingerprint() {  # where it is, too: the environment of a copy would import the original's code
    (cd "$_root" && { pwd && cat setup.py pyproject.toml constraints*.txt requirements*.lock csrc/* \
        megatron_ring/__init__.py; } | sha256sum | cut -c1-16)
}

_pip() {  # pip's own words only where it fails
    local log
    log="$("$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" 2>&1)" || {
        echo "$log" >&2
        return 1
    }
}

_is_locked() {  # is this one of the machines whose files requirements*.lock lists?
    [ "${RING_HASHES:-1}" != 0 ] && "$PYTHON" - <<'COVERED'
import platform
import sys

machine, (libc, _) = platform.machine(), platform.libc_ver()
covered = machine in ("x86_64", "aarch64") and libc == "glibc" and (3, 11) <= sys.version_info[:2] <= (3, 13)
sys.exit(not covered)
COVERED
}

# _pip_hashed FILE ...: install what requirements files list, each file by its SHA-256, or say in a line why not
_pip_hashed() {
    local words=() log file
    for file in "$@"; do words+=(-r "$file"); done
    log="$(mktemp)"
    if _pip --require-hashes --no-deps "${words[@]}" ${RING_PIP_ARGS:-} >"$log" 2>&1; then
        rm -f "$log"
        return
    fi
    local package got
    package="$(sed -n '/DO NOT MATCH THE HASHES/,$ s/^ *\([A-Za-z0-9._-]*==[^ ]*\).*/\1/p' "$log" | head -1)"
    got="$(sed -n 's/^ *Got  *//p' "$log" | head -1)"
    if grep -q 'DO NOT MATCH THE HASHES' "$log"; then
        echo "error: $package is not the file that was tested: its SHA-256 $got is not in $*; nothing was installed." \
            "Look where pip takes it from (pip config list); RING_HASHES=0 installs by version alone" >&2
    else
        got="$(grep -i '^error' "$log" | tail -1)"
        echo "error: pip could not install $* (${got:-$(tail -1 "$log")}); see that the package index can be reached" \
            "(pip config list). RING_HASHES=0 installs by version alone" >&2
    fi
    rm -f "$log"
    return 2
}

# _install_torch [PIP_WORD ...]: its exact version. PyPI does not have the CPU builds, so no lock has them
_install_torch() {
    local torch="torch==$TORCH_VERSION" index="https://download.pytorch.org/whl/cpu"
    if _has_cuda; then
        _say "installing torch for CUDA, with what it brings (by version; not in the lock)"
        _pip "$torch"
    elif ! "$PYTHON" -c "import torch; assert torch.__version__.split('+')[0] == '$TORCH_VERSION'" 2>/dev/null; then
        # the CPU build is 200 MB where the default index holds several GB of CUDA libraries
        if "$PYTHON" -c "import urllib.request as r; r.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
            _say "installing torch for the CPU (by version; its index gives the checksum)"
            _pip "$@" "$torch+cpu" --index-url "$index"
        else
            _say "installing torch (by version; PyTorch's CPU index does not answer: taking pip's default)"
            _pip "$torch"
        fi
    fi
}

_has_cuda() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }

_install() {  # _install EXTRA
    local extra="$1" locks=(requirements.lock) constraints="constraints-cpu.txt"
    if _has_cuda; then constraints="constraints.txt"; fi
    if _is_locked; then
        if [ "$extra" = dev ]; then
            locks+=(requirements-dev.lock)
            _has_cuda || locks+=(requirements-cpu.lock)
        fi
        _say "installing what megatron_ring needs, every file checked by its SHA-256 (${locks[*]})"
        _pip_hashed "${locks[@]}" || return 2
        # what it needs is there already, checked
        _install_torch --no-deps || return 2
        _say "installing megatron_ring"
        _pip --no-deps --no-build-isolation -e . || return 2
        "$PYTHON" -m pip --disable-pip-version-check check >/dev/null 2>&1 ||
            _say "note: $("$PYTHON" -m pip --disable-pip-version-check check 2>/dev/null | head -1)"
    else
        _say "note: installing by version, files not checked by hash (requirements.lock covers Linux with glibc on" \
            "x86_64 and aarch64 and Python 3.11 to 3.13; RING_HASHES=0 turns it off)"
        _install_torch || return 2
        _say "installing megatron_ring and what it needs"
        _pip -c "$constraints" "setuptools>=77" wheel ninja || return 2
        _pip -c "$constraints" --no-build-isolation -e ".${extra:+[$extra]}" || return 2
    fi
}

setup_env() {
    cd "$_root"
    local extra="${1:-}" stamp
    stamp=".venv/.ready-${extra:-run}-$(_fingerprint)"
    if [ -e "$stamp" ] && _is_supported "$PYTHON"; then
        return
    fi
    _make_venv || return 2
    _install "$extra" || return 2
    rm -f ".venv/.ready-${extra:-run}-"*
    touch "$stamp"
}
