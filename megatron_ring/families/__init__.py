"""Model families: one file each, data only. A new file beside these is a new family; nothing else lists them."""

import importlib
import pkgutil
from collections import Counter

from megatron_ring.families.family import Family, Needs, TensorNames

__all__ = ["ARCHITECTURES", "FAMILIES", "Family", "Needs", "TensorNames"]


def _found() -> dict[str, Family]:
    """The ``FAMILY`` of every module of this package that has one."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    families: list[Family] = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    for what, names in (
        ("name", [family.name for family in families]),
        ("architecture", [family.architecture for family in families]),
        ("preset", [name for family in families for name in family.presets]),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        assert not twice, f"two families have the {what} {twice[0]}"
    return {family.name: family for family in families}


FAMILIES = _found()
"""Name -> family."""

ARCHITECTURES = {family.architecture: family for family in FAMILIES.values()}
"""Class name in ``architectures`` of a config.json -> family."""
