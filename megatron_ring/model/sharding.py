"""How Megatron lays out what it saves; the conversions write the same without Megatron."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # a conversion imports no Megatron
    from megatron_ring.runtime.topology import Topology

SHARDING: Final = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}
"""Layer by layer, optimizer state in the parameters' shapes. Kept in ``common.pt``."""


def sharding_metadata(topology: Topology) -> dict[str, Any]:
    """What Megatron's ``sharded_state_dict`` asks for."""
    return {**SHARDING, "dp_cp_group": topology.groups.dp_cp}
