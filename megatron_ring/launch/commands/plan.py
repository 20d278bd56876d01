"""Layouts of a model that fit a number of GPUs and their memory, the promising ones first.

    ring plan --gpus 64 --memory-gib 80 --preset ring_lite --seq-length 4096

Every setting of the config is a flag here as well; the layout's own (tp, pp, vpp, ep, etp, sequence parallel)
are searched. Memory is weights, gradients and optimizer state of the fullest rank, exact, plus an
estimate of activations (bf16 or fp32, with the recompute setting given). No torch, no GPU: it runs on a login
node.
"""

import argparse
import math
import sys

from megatron_ring.config.load import OneLineParser, load_config
from megatron_ring.errors import ConfigError
from megatron_ring.launch.entry import end_with_reader
from megatron_ring.launch.plan import feasible_layouts, format_plans


def main() -> None:
    """Read the cluster's size, search, print."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpus", type=int, required=True, help="devices in the cluster")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="devices that share fast links")
    parser.add_argument("--memory-gib", type=float, required=True, help="memory of one device, GiB")
    parser.add_argument("--top", type=int, default=10, help="layouts to print")
    given, rest = parser.parse_known_args()
    for name in ("gpus", "gpus_per_node", "memory_gib", "top"):
        if not 0 < getattr(given, name) < math.inf:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} {getattr(given, name)} must be positive; name the cluster's real size"
            )
    config = load_config(rest)
    plans = feasible_layouts(config, given.gpus, given.gpus_per_node, given.memory_gib * 2**30)
    if not plans:
        raise ConfigError(
            f"no layout of this model fits {given.gpus} devices of {given.memory_gib:g} GiB; "
            "add devices, set --recompute-granularity full, or shorten --seq-length"
        )
    end_with_reader()
    print(format_plans(config, plans[: given.top], given.gpus, len(plans), styled=sys.stdout.isatty()))
