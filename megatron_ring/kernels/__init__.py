"""The model's performance-critical ops, each usable alone, on CUDA (Triton) and on the CPU (C++ or torch).

``dispatch`` selects the implementation; ``reference.py`` of each op defines what it computes.
"""

from megatron_ring.kernels.decode_attention import decode_attention
from megatron_ring.kernels.expert_mlp import expert_mlp
from megatron_ring.kernels.grouped_gemm import grouped_gemm
from megatron_ring.kernels.permute import combine, permute
from megatron_ring.kernels.qk_norm_rope import HeadNorms, qk_norm_rope
from megatron_ring.kernels.rms_norm import rms_norm
from megatron_ring.kernels.route_index import RouteIndex, route_index
from megatron_ring.kernels.routing import Routing, route
from megatron_ring.kernels.sample_token import sample_token
from megatron_ring.kernels.token_logprob import token_logprob

__all__ = [
    "HeadNorms",
    "RouteIndex",
    "Routing",
    "combine",
    "decode_attention",
    "expert_mlp",
    "grouped_gemm",
    "permute",
    "qk_norm_rope",
    "rms_norm",
    "route",
    "route_index",
    "sample_token",
    "token_logprob",
]
