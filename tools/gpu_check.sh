#!/usr/bin/env bash
# One GPU, under ten minutes: are the kernels right, how fast are they, does a Ring-lite-shaped model train and reinforce?
#
#   bash tools/gpu_check.sh                     all parts; results in gpu-check/, gpu-check/page.html at the end
#   bash tools/gpu_check.sh OUT right fast      only these parts, into OUT
#   RING_GPU_CHECK=tiny bash tools/gpu_check.sh the same code at tiny sizes, without a GPU too: a rehearsal
#
# Parts, in this order: compile (kernels, in parallel, into Triton's cache), same (a tiny model on GPU and CPU), right (every
# op against fp64), pretrain, fast, rl, tests (the kernel tests on the GPU), sanitizer (compute-sanitizer), page.
# It runs from a checkout, with the package installed or on PYTHONPATH; nothing is installed. A part that fails or takes too long is
# named, and the next one runs. Exit code 0 only if nothing is wrong.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:-gpu-check}
[ $# -gt 0 ] && shift
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(compile same right pretrain fast rl tests sanitizer page)
for each in "$OUT" "${PARTS[@]}"; do
    known=no
    [[ " compile same right pretrain fast rl tests sanitizer page " == *" $each "* ]] && known=yes
    if [ "$each" = "$OUT" ] && [ "$known" = yes ]; then
        echo "error: OUT=$OUT is the name of a part; name the folder for results first" >&2
        exit 2
    elif [ "$each" != "$OUT" ] && [ "$known" = no ]; then
        echo "error: $each is no part; name some of: compile same right pretrain fast rl tests sanitizer page" >&2
        exit 2
    fi
done
case "${RING_GPU_CHECK:-}" in
    "" | tiny) ;;
    *) echo "error: RING_GPU_CHECK=$RING_GPU_CHECK must be tiny, or not set" >&2 && exit 2 ;;
esac
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
mkdir -p "$OUT"
tiny=()
small=()
if [ "${RING_GPU_CHECK:-}" = tiny ]; then
    tiny=(--tiny)
    small=(--small)
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch finds no GPU here; RING_GPU_CHECK=tiny bash tools/gpu_check.sh rehearses without one" >&2
    exit 2
fi
failed=()

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begun=$SECONDS status=0
    shift 2
    [[ " ${PARTS[*]} " == *" $name "* ]] || return 0
    echo "== $name"
    # a part that dies early must not show what an earlier run found
    rm -f "$OUT/$name.json" "$OUT/$name-small.json"
    [ ! -f "$OUT/parts.txt" ] || sed -i "/^$name /d" "$OUT/parts.txt"
    timeout -k 5 "$limit" "$@" > >(tee "$OUT/$name.log") 2>&1 || status=$?
    [ "$status" -eq 0 ] || failed+=("$name (exit code $status)")
    # for the page: not every part writes results, and one that dies writes none
    [ "$name" = page ] || echo "$name $status $((SECONDS - begun))" >> "$OUT/parts.txt"
    echo "== $name: exit code $status, $((SECONDS - begun)) s, $SECONDS s in all"
}

if [ ${#tiny[@]} -eq 0 ]; then
    part compile 60 "$PYTHON" tools/gpu/launches.py --for-this-card --sets step --jobs "$(nproc)"
fi
part same 120 "$PYTHON" tools/gpu/same.py "$OUT"
part right 110 "$PYTHON" tools/gpu/right.py "$OUT" "${small[@]}"
part pretrain 120 "$PYTHON" tools/gpu/whole.py "$OUT" pretrain "${tiny[@]}"
part fast 110 "$PYTHON" tools/gpu/fast.py "$OUT" "${tiny[@]}"
part rl 110 "$PYTHON" tools/gpu/whole.py "$OUT" rl "${tiny[@]}"
if [ ${#tiny[@]} -eq 0 ]; then
    export RING_TEST_DEVICE=cuda
    part tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels
    unset RING_TEST_DEVICE
    if command -v compute-sanitizer > /dev/null; then
        # torch's allocator would hide what lies beyond a tensor
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        part sanitizer 120 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" tools/gpu/right.py "$OUT" --small
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
    else
        echo "== sanitizer: there is no compute-sanitizer here"
    fi
fi
part page 30 "$PYTHON" tools/gpu/page.py "$OUT"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
