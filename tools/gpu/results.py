"""The results of the check's parts: one JSON file each, written after every row."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatron_ring

ROOT = Path(__file__).resolve().parents[2]


class Results:
    """The rows of one part, printed and kept. ``bad`` holds a line for each thing that is wrong.

    ``goes_on``: append to what an earlier process of the part has written.
    """

    def __init__(self, folder: Path, part: str, goes_on: bool = False):
        self.path = folder / f"{part}.json"
        self.rows: list[dict[str, Any]] = []
        self.bad: list[str] = []
        self.facts: dict[str, Any] = {"where": where()}
        self._begun = time.perf_counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"error: OUT={folder} cannot be written ({error.strerror}); name a folder that can")
        if goes_on:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.rows, self.bad = found["rows"], found["bad"]
            self._begun -= found["seconds"]

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
    """The card, the package that is checked and the versions; ``{"device": "cpu", ...}`` without a card."""
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "megatron_ring": f"{megatron_ring.__version__}, {kind(Path(megatron_ring.__file__).parent)}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "numpy": np.__version__,
        "megatron-core": _version("megatron-core"),
    }
    optional = {name: _version(name) for name in ("transformer-engine", "flash-attn", "liger-kernel", "apex")}
    return found | {name: version for name, version in optional.items() if version != "not installed"}


def kind(package: Path) -> str:
    """Where the package in this folder comes from: ``installed``, ``checkout`` or ``another checkout``."""
    if package.resolve().parent == ROOT:
        return "checkout"
    return "another checkout" if (package.resolve().parent / "pyproject.toml").exists() else "installed"


def children_path(*first: Path) -> str:
    """The PYTHONPATH with which a process finds the package that this one has: ``first`` comes first."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([*map(str, first), *given, str(Path(megatron_ring.__file__).resolve().parents[1])])


def _version(name: str) -> str:
    """The version of a distribution, without importing it, which would take seconds."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
