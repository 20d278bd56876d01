"""RMSNorm that knows sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ring.kernels import rms_norm


class RingRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in fp32.

    Under sequence parallelism every tensor rank sees other tokens; ``weight.sequence_parallel`` makes
    Megatron sum the weight's gradient over the tensor-parallel group (the stock wrapper refuses instead).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_ignored: object):
        super().__init__()
        self.eps = eps
        device = torch.device("cpu") if config.use_cpu_initialization else None
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
