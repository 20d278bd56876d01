"""Calls of a user's code, which a setting names as ``module:name``: an exception in it becomes one line."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from megatron_ring.config.settings import is_importable
from megatron_ring.errors import ConfigError, RingError
from megatron_ring.runtime.peers import follows_from_another

log = logging.getLogger("megatron_ring")


@contextmanager
def own_code(setting: str, value: str, error: type[RingError] = ConfigError) -> Generator[None]:
    """An exception of the user's code that ``setting=value`` names, raised in this block, becomes an ``error``
    with its place; a SystemExit too, which would end the run as if it were done.

    Exceptions of built-in code are not changed, nor are those that follow from the end of another rank.
    ``--log-level debug`` shows the traceback.

    Example: ``with own_code("objective", "my_losses:mine"): ...``.
    """
    try:
        yield
    except RingError:
        raise
    except (Exception, SystemExit) as raised:
        if not is_importable(value) or _is_of_a_peer(raised):
            raise
        log.debug("%s=%s raised:", setting, value, exc_info=raised)
        what = " ".join(f"{type(raised).__name__}: {raised}".split()).removesuffix(":")
        raise error(
            f"{setting}={value} raised {what}{_place(raised, value)}; correct it (--log-level debug shows the traceback)"
        ) from raised


def _place(raised: Exception | SystemExit, value: str) -> str:
    """The last line of the user's own package that the exception came through."""
    package = value.partition(":")[0].partition(".")[0]
    lines = [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(raised.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] == package
    ]
    return lines[-1] if lines else ""


def _is_of_a_peer(raised: Exception | SystemExit) -> bool:
    """Has another rank ended? A ConnectionError may be that of a user's own server."""
    return not isinstance(raised, ConnectionError) and follows_from_another(raised)
