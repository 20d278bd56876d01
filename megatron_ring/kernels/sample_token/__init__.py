"""One token per row of logits, and its log p."""

from megatron_ring.kernels.sample_token.op import sample_token

__all__ = ["sample_token"]
