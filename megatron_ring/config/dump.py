"""A config as text: TOML that loads back to the same config, and a table for people."""

import json
from collections.abc import Collection
from typing import Any, cast

from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import sections, settings


def flat(config: RunConfig) -> dict[str, Any]:
    """Flat name -> value of every setting, in the order of the sections."""
    return {s.name: getattr(getattr(config, s.section), s.name) for s in settings().values()}


def dump_toml(config: RunConfig) -> str:
    """TOML text, one table per section; loading it gives an equal config. None is written as "none"."""
    values = flat(config)
    blocks: list[str] = []
    for section in sections():
        names = [s.name for s in settings().values() if s.section == section]
        lines = [f"{name} = {_toml(values[name])}" for name in names]
        blocks.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def format_config(config: RunConfig, only: Collection[str] | None = None) -> str:
    """A table by section, of all sections or ``only`` some; a star marks what differs from the default."""
    values = flat(config)
    shown = [section for section in sections() if only is None or section in only]
    width = max((len(s.name) for s in settings().values() if s.section in shown), default=0)
    lines: list[str] = []
    for section in shown:
        lines += [f"{section}"]
        for s in settings().values():
            if s.section == section:
                mark = " " if values[s.name] == s.default else "*"
                lines.append(f" {mark} {s.name:<{width}}  {_toml(values[s.name])}")
    return "\n".join(lines)


def format_changed(config: RunConfig, only: Collection[str] | None = None) -> str:
    """``name=value`` of what differs from the defaults, of all sections or ``only`` some, as lines of 118 characters.

    Example line: ``"  num_layers=2 seq_length=256 lr=0.002"``; of a config of defaults, ``"  nothing"``.
    """
    values = flat(config)
    lines = [" "]
    for s in settings().values():
        if values[s.name] == s.default or (only is not None and s.section not in only):
            continue
        word = f" {s.name}={_toml(values[s.name])}"
        if lines[-1] != " " and len(lines[-1] + word) > _LINE_WIDTH:
            lines.append(" ")
        lines[-1] += word
    return "  nothing" if lines == [" "] else "\n".join(lines)


_LINE_WIDTH = 118


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in cast('tuple[Any, ...]', value))}]"
    if isinstance(value, str):
        # TOML forbids a raw DEL, which JSON allows
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
