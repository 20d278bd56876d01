"""Write a Hugging Face folder of random weights in the shape of a preset, for tests and measurements.

python tools/make_random_checkpoint.py --preset ring_lite --output scratch/ring_lite
python tools/make_random_checkpoint.py --preset ring_mini_v2_tiny --dtype fp32 --output scratch/tiny
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ring.config.load import OneLineParser, preset_config
from megatron_ring.config.presets import PRESETS
from megatron_ring.errors import CheckpointError
from megatron_ring.launch.entry import run_entry

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from megatron_ring.checkpoint.convert.random_weights import write_random_checkpoint

    model = preset_config(args.preset).model
    changes = {
        name: value
        for name, value in (("num_layers", args.num_layers), ("mtp_num_layers", args.mtp_num_layers))
        if value is not None
    }
    if args.num_layers is not None and args.num_layers <= model.first_k_dense_replace:
        raise CheckpointError(
            f"num_layers={args.num_layers} must be above {model.first_k_dense_replace}; try 2"
        )
    if (args.mtp_num_layers or 0) < 0:
        raise CheckpointError(f"mtp_num_layers={args.mtp_num_layers} must not be negative; try 0")
    if not 0 < args.max_file_gb < float("inf"):
        raise CheckpointError(f"max_file_gb={args.max_file_gb} must be positive; try 2")
    if args.output.exists():
        raise CheckpointError(f"{args.output}: exists already; name another folder or remove it")
    size = write_random_checkpoint(
        replace(model, **changes), args.output, DTYPES[args.dtype], int(args.max_file_gb * 1e9), args.seed
    )
    print(json.dumps({"folder": str(args.output), "parameters": size.parameters, "bytes": size.bytes}))


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), required=True, help="whose shape")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not exist yet")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="of the weights (default: bf16)"
    )
    parser.add_argument("--num-layers", type=int, help="as many layers instead of the preset's")
    parser.add_argument(
        "--mtp-num-layers", type=int, help="multi-token-prediction layers instead of the preset's"
    )
    parser.add_argument("--max-file-gb", type=float, default=2.0, help="largest file (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    run_entry(main)
