"""Attention of one new token per sequence over cached keys and values."""

from megatron_ring.kernels.decode_attention.op import decode_attention

__all__ = ["decode_attention"]
