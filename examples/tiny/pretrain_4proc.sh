#!/usr/bin/env bash
# The tiny run of pretrain.toml on four processes of this machine: two pipeline stages, experts over two processes.
# Further flags are passed on, such as --dry-run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
exec "${PYTHON:-$python}" -m megatron_ring launch --standalone --nproc-per-node 4 pretrain \
    --config examples/tiny/pretrain.toml \
    --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 \
    "$@"
