"""Permute and combine: copy token rows into expert order, and sum them back."""

from megatron_ring.kernels.permute.op import combine, permute

__all__ = ["combine", "permute"]
