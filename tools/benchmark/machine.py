"""Where a benchmark runs and in which dtype: on the GPU in bf16 where there is one, else on the CPU in fp32.

``MEGATRON_RING_DEVICE=cpu`` keeps ours and its peers on the CPU of a machine that has a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys


def add_bf16(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="default: bf16 on a GPU, fp32 on a CPU",
    )


def wants_bf16(asked: bool | None) -> bool:
    from megatron_ring.runtime.device import has_cuda

    return has_cuda() if asked is None else asked


def device_name() -> str:
    """What torch of this interpreter runs on: a GPU's name, or ``cpu``. A peer's interpreter answers it too."""
    import torch

    on_cpu = os.environ.get("MEGATRON_RING_DEVICE", "").lower() == "cpu" or not torch.cuda.is_available()
    return "cpu" if on_cpu else torch.cuda.get_device_name()


def described(bf16: bool) -> str:
    """Example: ``NVIDIA H100 80GB HBM3, bf16`` or ``cpu, fp32``."""
    return f"{device_name()}, {'bf16' if bf16 else 'fp32'}"


def require_cpu(name: str, why: str) -> None:
    """End with one line where this process would run on a GPU."""
    if device_name() != "cpu":
        print(
            f"error: {name} measures {why}, and this machine has a GPU; set MEGATRON_RING_DEVICE=cpu",
            file=sys.stderr,
        )
        sys.exit(2)


def require_same_device(devices: dict[str, str]) -> None:
    """End with one line where the sides of a comparison run on different devices: {who: device_name()}."""
    if len(set(devices.values())) > 1:
        said = ", ".join(f"{who} on {device}" for who, device in devices.items())
        print(
            f"error: {said}: nothing to compare; give the peer an interpreter whose torch sees the GPU, "
            "or set MEGATRON_RING_DEVICE=cpu",
            file=sys.stderr,
        )
        sys.exit(2)


def agree(name: str, mine, theirs, limit: float) -> None:
    """End unless two tensors are equal to within ``limit`` of the second's norm."""
    gap = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
    if not gap < limit:
        raise SystemExit(f"{name} differs by {gap:.1e} of its norm, more than {limit:.0e}: nothing to time")
