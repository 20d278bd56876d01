"""RMSNorm with support for sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ring.kernels import rms_norm


class RingRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in fp32.

    Under sequence parallelism every tensor rank has different tokens; with ``weight.sequence_parallel`` Megatron sums the
    weight's gradient over the tensor-parallel group (upstream's wrapper refuses sequence parallelism).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_ignored: object):
        super().__init__()
        self.eps = eps
        device = torch.device("cpu") if config.use_cpu_initialization else None
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
