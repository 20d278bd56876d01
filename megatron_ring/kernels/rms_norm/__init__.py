"""RMSNorm in one pass, with one backward."""

from megatron_ring.kernels.rms_norm.op import rms_norm

__all__ = ["rms_norm"]
