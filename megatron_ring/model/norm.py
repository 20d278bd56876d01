"""RMSNorm that knows sequence parallelism."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


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
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return (normed * self.weight.float()).to(x.dtype)
