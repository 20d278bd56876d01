"""Grouped GEMM: one matrix product per expert over rows sorted by expert."""

from megatron_ring.kernels.grouped_gemm.op import grouped_gemm

__all__ = ["grouped_gemm"]
