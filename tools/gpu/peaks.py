"""The maker's figures for a card: dense bf16 FLOP/s and memory bandwidth in bytes per second.

A card is listed under words of its driver's name; the first entry that fits counts. A GH200's name contains
H200, but not as a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Example: ``peak_of("NVIDIA H100 80GB HBM3") == Peak(989e12, 3.35e12)``."""

    flops: float
    bytes: float


PEAKS = {
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "H200 NVL": Peak(835e12, 4.8e12),
    "H200": Peak(989e12, 4.8e12),
    "B200": Peak(2250e12, 8.0e12),
    "A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "A100 80GB PCIe": Peak(312e12, 1.935e12),
    "A100": Peak(312e12, 1.555e12),
}


def peak_of(name: str) -> Peak | None:
    """None for a card that is not listed, and for a CPU."""
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{re.escape(words)}\b", name)), None)
