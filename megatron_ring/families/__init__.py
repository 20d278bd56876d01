"""Model families: one file each, data only. A new file beside these is a new family; nothing else lists them."""

import importlib
import pkgutil

from megatron_ring.families.family import Family, Needs, TensorNames

__all__ = ["ARCHITECTURES", "FAMILIES", "Family", "Needs", "TensorNames"]


def _found() -> dict[str, Family]:
    """The ``FAMILY`` of every module of this package that has one."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    families: list[Family] = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    found = {family.name: family for family in families}
    assert len(found) == len(families), f"two families of one name among {[f.name for f in families]}"
    return found


FAMILIES = _found()
"""Name -> family."""

ARCHITECTURES = {family.architecture: family for family in FAMILIES.values()}
"""Class name in ``architectures`` of a config.json -> family."""
