#!/usr/bin/env bash
# One GPU, under ten minutes: are the kernels right, how fast are they, does a Ring-lite-shaped model train and reinforce?
#
#   bash tools/gpu_check.sh                     all parts; results in gpu-check/ where you stand, its page.html at the end
#   bash tools/gpu_check.sh OUT right fast      only these parts, into OUT
#   RING_GPU_CHECK_LIMIT=300 bash tools/gpu_check.sh   seconds that every part may take, in place of its own
#   RING_GPU_CHECK=tiny bash tools/gpu_check.sh the same code at tiny sizes, without a GPU too: a rehearsal
#
# Parts, in this order: compile (kernels, in parallel, into Triton's cache), same (a tiny model on GPU and CPU), right (every
# op against fp64), pretrain, fast, rl, tests (the kernel tests on the GPU), sanitizer (compute-sanitizer), page.
# It runs from a checkout and installs nothing. It checks the megatron_ring that is installed, or on PYTHONPATH; where there is
# none, the checkout's. A part that fails or takes too long is named, and the next one runs. Exit code 0 only if nothing is wrong.
# On a machine without a network: tools/gpu/offline.sh gathers the wheels that it lacks, and its head has that day's commands.
set -uo pipefail

fail() { echo "error: $*" >&2 && exit 2; }

case "${1:-}" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    -*) fail "$1 is no word of this script; name the folder for results first, then parts (--help)" ;;
esac
asked=${PYTHON:-python3}
PYTHON=$(command -v "$asked") || fail "there is no $asked here; name a Python in PYTHON"
paths=
IFS=: read -ra given <<< "${PYTHONPATH:-}"
for each in ${given[@]+"${given[@]}"}; do
    [ -z "$each" ] || paths+=":$([[ $each == /* ]] || printf '%s/' "$PWD")$each"
done
OUT=${1:-gpu-check}
[ $# -gt 0 ] && shift
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(compile same right pretrain fast rl tests sanitizer page)
all=" compile same right pretrain fast rl tests sanitizer page "
[[ "$all" != *" $OUT "* ]] || fail "OUT=$OUT is the name of a part; name the folder for results first"
for each in "${PARTS[@]}"; do
    [[ -n "$each" && "$each" != *" "* && "$all" == *" $each "* ]] || fail "'$each' is no part; name some of:${all% }"
done
[[ "${RING_GPU_CHECK:-}" =~ ^(tiny)?$ ]] || fail "RING_GPU_CHECK=$RING_GPU_CHECK must be tiny, or not set"
[[ "${RING_GPU_CHECK_LIMIT:-1}" =~ ^[1-9][0-9]{0,5}$ ]] ||
    fail "RING_GPU_CHECK_LIMIT=$RING_GPU_CHECK_LIMIT must be a whole number of seconds, at least 1"
[[ "$OUT" == /* ]] || OUT=$here/$OUT
[[ "$PYTHON" == /* ]] || PYTHON=$here/$PYTHON
tiny=()
small=()
slower=1
right=right
card=(--for-this-card --sets step right tiny --jobs "$(nproc)")
if [ "${RING_GPU_CHECK:-}" = tiny ]; then
    tiny=(--tiny)
    small=(--small)
    slower=5
    right=right-small
    card=(--sets tiny)
fi
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"

# the checkout's tools and tests, as packages that nobody else's of these names can hide, without its megatron_ring
helpers=$(mktemp -d)
group=
trap 'rm -rf "$helpers"' EXIT
name=
stop() { # the part that runs and all that it started
    [ -z "$group" ] || { kill -KILL -- "-$group" && wait; } 2> /dev/null
    echo "== stopped${name:+ in the midst of $name}; what was found so far is in $OUT" >&2
    exit 130
}
trap stop INT TERM HUP
for each in tools tests; do
    mkdir "$helpers/$each"
    ln -s "$PWD/$each"/* "$helpers/$each/"
    touch "$helpers/$each/__init__.py"
done
checked=$(PYTHONPATH="${paths#:}" "$PYTHON" -P tools/gpu/parts.py package) || exit 2
[ "$checked" = installed ] || paths=":$PWD$paths"
export PYTHONPATH="$helpers$paths"
"$PYTHON" tools/gpu/parts.py where "$OUT" "${tiny[@]}" || exit 2
if command -v flock > /dev/null; then
    exec 9> "$OUT/.lock"
    flock -n 9 || fail "another check writes into OUT=$OUT; name another folder, or wait for it"
fi
failed=()

used() { nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2> /dev/null | head -1; }

part() { # NAME SECONDS COMMAND...
    # a machine that rehearses is slow
    name=$1
    local limit=${RING_GPU_CHECK_LIMIT:-$(($2 * slower))} begun=$SECONDS status=0 taken tail left
    shift 2
    [[ " ${PARTS[*]} " == *" $name "* ]] || return 0
    echo "== $name"
    # a part that dies early must not show what an earlier run found
    rm -f "$OUT/$name.json" "$OUT/$name-small.json"
    : > "$OUT/$name.log"
    # SIGINT, so that it says where it was; a group of its own, so that nothing of it is left on the GPU
    env --default-signal=INT timeout -s INT -k 5 "$limit" "$@" >> "$OUT/$name.log" 2>&1 9>&- &
    group=$!
    tail -n +1 -s 0.2 -f --pid="$group" "$OUT/$name.log" &
    tail=$!
    wait "$group" || status=$?
    { kill -KILL -- "-$group"; } 2> /dev/null
    group=
    wait "$tail"
    taken=$((SECONDS - begun))
    [ "$name" = page ] || "$PYTHON" tools/gpu/parts.py ended "$OUT" "${name/#right/$right}" "$status" "$taken" "$limit" ||
        [ "$status" -ne 0 ] || status=1
    [ "$status" -eq 0 ] || failed+=("$name (exit code $status)")
    echo "== $name: exit code $status, $taken s, $SECONDS s in all"
    left=$(used)
    [ "${left:-0}" -le $((${at_start:-0} + 1024)) ] || echo "== $name: $left MiB of the GPU are still in use, $at_start at first"
}

at_start=$(used)
part compile 120 "$PYTHON" tools/gpu/launches.py --out "$OUT" "${card[@]}"
part same 120 "$PYTHON" tools/gpu/same.py "$OUT"
part right 110 "$PYTHON" tools/gpu/right.py "$OUT" "${small[@]}"
part pretrain 120 "$PYTHON" tools/gpu/whole.py "$OUT" pretrain "${tiny[@]}"
part fast 110 "$PYTHON" tools/gpu/fast.py "$OUT" "${tiny[@]}"
part rl 110 "$PYTHON" tools/gpu/whole.py "$OUT" rl "${tiny[@]}"
part tests 120 "$PYTHON" tools/gpu/kernel_tests.py "$OUT" "${tiny[@]}"
if [ ${#tiny[@]} -eq 0 ] && ! command -v compute-sanitizer > /dev/null; then
    echo "== sanitizer: there is no compute-sanitizer here"
elif [ ${#tiny[@]} -eq 0 ]; then
    # torch's allocator would hide what lies beyond a tensor
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    part sanitizer 120 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" tools/gpu/right.py "$OUT" --small
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
part page 30 "$PYTHON" tools/gpu/page.py "$OUT"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
