"""Where the copies of each token lie once they are sorted by expert."""

from megatron_ring.kernels.route_index.op import RouteIndex, route_index

__all__ = ["RouteIndex", "route_index"]
