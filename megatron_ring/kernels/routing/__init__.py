"""Routing: which experts each token visits, and with what weight."""

from megatron_ring.kernels.routing.op import Routing, route

__all__ = ["Routing", "route"]
