"""A corpus that needs no download: the Python standard library's source code and docstrings.

Each module is one document of real English and code.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

from megatron_ring.errors import DataError

# tests, generated tables and translated copies of the same text: little to learn from
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# these hold paths and flags of the machine that built this Python
_SKIPPED_MODULES = ("_sysconfigdata", "_sysconfig_vars")


def builtin_documents(max_mb: float | None = None) -> list[str]:
    """Sources of the standard library's modules, in an order that depends on their names only.

    Modules are ordered by a hash of their path, so that every part of a split by documents is a random sample.

    Args:
        max_mb: stop after the document that reaches this many megabytes (10**6 bytes of UTF-8); ``None`` for
            all of it (about 9 MB).

    Raises:
        DataError: this Python has no standard library on disk (some embedded ones), or ``max_mb`` is not
            positive.
    """
    if max_mb is not None and max_mb <= 0:
        raise DataError(f"max_mb={max_mb} of the built-in corpus must be positive; 4 is enough to try things")
    root = Path(sysconfig.get_path("stdlib"))
    limit = float("inf") if max_mb is None else max_mb * 1e6
    documents: list[str] = []
    size = 0
    for path in sorted(_module_files(root), key=lambda path: _order_key(path, root)):
        if size >= limit:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            documents.append(text)
            size += len(text.encode())
    if not documents:
        raise DataError(
            f"no Python sources under {root}: the built-in corpus is the standard library; give --input"
        )
    return documents


def _module_files(root: Path) -> list[Path]:
    return [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
        and not path.name.startswith(_SKIPPED_MODULES)
    ]


def _order_key(path: Path, root: Path) -> bytes:
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
