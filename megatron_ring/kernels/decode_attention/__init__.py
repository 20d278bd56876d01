"""From the projection of one new token per sequence to its context, over cached keys and values."""

from megatron_ring.kernels.decode_attention.op import decode_attention

__all__ = ["decode_attention"]
