"""From the attention's projection to its queries, keys and values: head norms and rotary positions."""

from megatron_ring.kernels.qk_norm_rope.op import HeadNorms, qk_norm_rope

__all__ = ["HeadNorms", "qk_norm_rope"]
