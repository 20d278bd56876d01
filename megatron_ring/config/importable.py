"""Import of a user's own objects, which a setting names as ``module:name``."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import is_importable, settings
from megatron_ring.errors import ConfigError, RingError


def require_module(shown: str, path: str, error: type[RingError] = ConfigError) -> None:
    """Raise ``error`` if the module that ``path`` names does not exist; only its parent packages are imported.

    Args:
        shown: setting and value, at the beginning of the line.
        path: ``module:name``.
        error: RewardError for a verifier.
    """
    module = path.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise error(f"{shown}: no module {module}; install it or set PYTHONPATH")


def load_object(shown: str, path: str, error: type[RingError] = ConfigError) -> Any:
    """The object ``name`` of ``module``, imported; None where the module has no such name.

    Raises:
        RingError: of type ``error``, in one line: there is no such module, or its import raises.
    """
    require_module(shown, path, error)
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as raised:
        # a script that ends with sys.exit() would end the run as if it were done
        why = " ".join(f"{type(raised).__name__}: {raised}".split()).removesuffix(":")
        raise error(f"{shown} cannot be imported ({why}); import {module} by hand to see why") from raised


def resolve(
    setting: str, value: str, registered: Mapping[str, Any], problem: Callable[[Any], str | None]
) -> Any:
    """What ``value`` of ``setting`` names: one of ``registered``, or a user's object as ``module:name``.

    ``name`` is an attribute of the module, or a name that the module's import has added to ``registered``.

    Args:
        problem: says why an object is not of the setting's kind; None if it is.

    Raises:
        ConfigError: there is no such object, it is of another kind, or its module's import raises.

    Example: ``resolve("objective", "my_losses:mine", POLICY_LOSSES, problem)``.
    """
    if value in registered:
        return registered[value]
    shown = f"{setting}={value}"
    if not is_importable(value):
        own = f"{', '.join(registered)}, or module:name of your own"
        raise ConfigError(f"{shown} does not exist; try one of {own}")
    module, _, name = value.partition(":")
    found = load_object(shown, value)
    if name in registered and name not in settings()[setting].choices and problem(found) is not None:
        found = registered[name]
    if found is None:
        raise ConfigError(f"{shown}: module {module} neither has nor registers {name}; correct the name")
    why = problem(found)
    if why is not None:
        raise ConfigError(f"{shown} {why}")
    return found


def require_own_modules(config: RunConfig) -> None:
    """Find the modules that settings name as ``module:name``, those of reward functions included."""
    for setting in settings().values():
        value = getattr(getattr(config, setting.section), setting.name)
        if setting.importable and value not in setting.choices:
            require_module(f"{setting.name}={value}", value)
    for word in config.reward.reward_functions:
        require_module(f"reward_functions={word}", word.partition("=")[2])
