"""Log-probability of the taken token and entropy over a vocabulary split across ranks."""

from megatron_ring.kernels.token_logprob.op import token_logprob

__all__ = ["token_logprob"]
