"""From the projection of one new token per sequence to its context, over cached keys and values."""

from megatron_ring.kernels.decode_attention.op import HeadNorms, decode_attention

__all__ = ["HeadNorms", "decode_attention"]
