"""Call Megatron's parallel linears without the overhead that only training or several ranks need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn


def project(linear: nn.Module, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """``linear(x)``; a plain product if there is no gradient and no tensor parallelism. ``weight`` stands in for the
    linear's own: tied embeddings.

    For the row of one decoded token, upstream's wrappers cost more than the product.
    """
    bare = type(linear) is ColumnParallelLinear or type(linear) is RowParallelLinear
    if bare and not torch.is_grad_enabled() and linear.config.tensor_model_parallel_size == 1:
        return F.linear(x, linear.weight if weight is None else weight, linear.bias)
    return linear(x)[0] if weight is None else linear(x, weight=weight)[0]


def swiglu_mlp(mlp: MLP, x: Tensor) -> Tensor:
    """A dense or shared-expert MLP: ``linear_fc2(silu(gate) * up)``, through :func:`project` without gradients."""
    if torch.is_grad_enabled():
        output = mlp(x)
        return output if isinstance(output, Tensor) else output[0]
    gate, up = project(mlp.linear_fc1, x).chunk(2, dim=-1)
    return project(mlp.linear_fc2, F.silu(gate) * up)
