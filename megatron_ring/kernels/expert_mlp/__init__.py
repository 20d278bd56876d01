"""The experts' SwiGLU network over rows sorted by expert, as one differentiable op."""

from megatron_ring.kernels.expert_mlp.op import expert_mlp

__all__ = ["expert_mlp"]
