"""Where the parts of the check leave what they found: one JSON file each, written after every row."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Results:
    """The rows of one part, printed and kept. ``bad`` holds a line for each thing that is wrong."""

    def __init__(self, folder: Path, part: str):
        self.path = folder / f"{part}.json"
        self.rows: list[dict[str, Any]] = []
        self.bad: list[str] = []
        self.facts: dict[str, Any] = {"where": where()}
        self._begun = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)

    def row(self, **values: Any) -> None:
        self.rows.append(values)
        words = (
            f"{name} {value:.4g}" if isinstance(value, float) else str(value)
            for name, value in values.items()
        )
        print("  ".join(words), flush=True)
        self.write()

    def wrong(self, line: str) -> None:
        self.bad.append(line)
        print(f"WRONG  {line}", flush=True)
        self.write()

    def write(self) -> None:
        seconds = round(time.perf_counter() - self._begun, 1)
        found = {**self.facts, "seconds": seconds, "bad": self.bad, "rows": self.rows}
        self.path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def where() -> dict[str, str]:
    """The card and the versions; ``{"device": "cpu", ...}`` without one."""
    triton = _version("triton")
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton,
        "numpy": np.__version__,
        "megatron-core": _version("megatron.core"),
    }
    optional = {name: _version(name) for name in ("transformer_engine", "flash_attn", "liger_kernel", "apex")}
    return found | {name: version for name, version in optional.items() if version != "not installed"}


def _version(module: str) -> str:
    try:
        return str(getattr(__import__(module, fromlist=["__version__"]), "__version__", "installed"))
    except ImportError:
        return "not installed"
