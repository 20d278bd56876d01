#!/usr/bin/env bash
# Make the sandbox for model-written code ready: bubblewrap and libseccomp of the system, pyseccomp in the environment.
# Then try it: whether its walls hold here is a matter of the kernel and of the container, not only of packages.
#
#   tools/setup_sandbox.sh      # does nothing but the check if all is there; PYTHON names another interpreter
set -euo pipefail

cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
[ -x "$(command -v "$python")" ] || {
    echo "error: no $python; run \`source tools/setup_env.sh && setup_env\` first, or name an interpreter in PYTHON" >&2
    exit 2
}

packages=()
command -v bwrap >/dev/null || packages+=(bubblewrap)
"$python" -c 'import ctypes.util, sys; sys.exit(not ctypes.util.find_library("seccomp"))' || packages+=(libseccomp2)
[ -e /usr/bin/python3 ] || packages+=(python3-minimal)

if [ "${#packages[@]}" -gt 0 ]; then
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
        echo "error: ${packages[*]} must be installed, which needs apt-get and root; ask an administrator for it" >&2
        exit 2
    fi
    if [ "${RING_APT:-1}" = 0 ]; then
        echo "error: ${packages[*]} must be installed, and RING_APT=0 forbids apt-get; install them by hand" >&2
        exit 2
    fi
    echo "apt-get installs ${packages[*]} on this machine now, as root (RING_APT=0 forbids it)"
    install=("${as_root[@]}" apt-get install -y --no-install-recommends "${packages[@]}")
    # a fresh machine's package lists may be missing or old
    DEBIAN_FRONTEND=noninteractive "${install[@]}" >/dev/null 2>&1 || {
        "${as_root[@]}" apt-get update -qq >/dev/null || true
        DEBIAN_FRONTEND=noninteractive "${install[@]}" >/dev/null || {
            echo "error: apt-get could not install ${packages[*]}; install them by hand" >&2
            exit 2
        }
    }
fi
if ! "$python" -c 'import pyseccomp' 2>/dev/null; then
    hashes=(--require-hashes)
    [ "${RING_HASHES:-1}" != 0 ] || hashes=()
    # its entry: the line of the version and those of the hashes behind it
    said="$("$python" -m pip install --quiet --disable-pip-version-check --no-deps "${hashes[@]}" \
        -r <(sed -n '/^pyseccomp==/,/[^\\]$/p' requirements.lock) 2>&1)" || {
        echo "error: pip could not install pyseccomp for $python ($(grep -i -m1 '^error' <<<"$said")); see that its" \
            "environment can be written and that the package index can be reached (pip config list)" >&2
        exit 2
    }
fi

"$python" - <<'PROBE'
import sys

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox

try:
    Sandbox.open()
except RewardError as error:
    sys.exit(f"error: {error}")
print("the sandbox is ready: its isolation has been tried")
PROBE
