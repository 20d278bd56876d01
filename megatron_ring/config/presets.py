"""Known models by name: the published shapes, and a tiny relative of each that trains on a CPU in seconds.

A preset is the lowest layer of a config: flat names and values that a TOML file and flags may override. The
tiny ones also bring what a CPU run needs (fp32, short samples). Each family's file has its own.
"""

from typing import Any, Final

from megatron_ring.families import FAMILIES

PRESETS: Final[dict[str, dict[str, Any]]] = {
    name: {"family": family.name, **values}
    for family in FAMILIES.values()
    for name, values in family.presets.items()
}
"""Preset name -> flat settings that differ from the defaults."""
