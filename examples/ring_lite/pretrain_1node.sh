#!/usr/bin/env bash
# Ring-lite pre-training on one node with 8 devices. Further flags are passed on, such as --dry-run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# Megatron's overlap of communication and compute relies on one hardware queue
export CUDA_DEVICE_MAX_CONNECTIONS=1
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
exec "${PYTHON:-$python}" -m megatron_ring launch --standalone --nproc-per-node 8 pretrain \
    --config examples/ring_lite/pretrain.toml \
    "$@"
