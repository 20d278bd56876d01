"""Routing: which experts each token visits, with what weight, and where its copies lie once sorted."""

from megatron_ring.kernels.routing.op import RouteIndex, Routing, route, route_index

__all__ = ["RouteIndex", "Routing", "route", "route_index"]
