"""Documents out of what people have: JSONL, plain text, folders of either, or the built-in corpus.

Reading is split in two so that worker processes can do the second half: :func:`read_records` yields raw
records in a deterministic order, :func:`record_text` decodes one into its document.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from megatron_ring.errors import DataError

_JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One document as it lies on disk.

    Example: ``Record(raw=b'{"text": "One."}', origin="web.jsonl:1", is_json=True, is_named=True)``.
    """

    raw: bytes
    """UTF-8 text, or a line of JSON."""
    origin: str
    """File, and line in JSONL, for messages."""
    is_json: bool
    """``raw`` is a JSON object with the text under some of its keys."""
    is_named: bool
    """The user named the file itself; files found in a folder may turn out not to be text."""


def find_files(inputs: Sequence[str | Path]) -> list[tuple[Path, bool]]:
    """The files to read, in order, each with whether the user named it. Hidden files are left out.

    Raises:
        DataError: an input is missing, or a folder holds no files.
    """
    files: list[tuple[Path, bool]] = []
    for item in map(Path, inputs):
        if item.is_dir():
            found = sorted(path for path in item.rglob("*") if path.is_file() and not _is_hidden(path, item))
            if not found:
                raise DataError(f"input folder {item} holds no files; name a folder of text or JSONL files")
            files += [(path, False) for path in found]
        elif item.is_file():
            files.append((item, True))
        else:
            raise DataError(
                f"input {item} does not exist; name a text file, a JSONL file or a folder of them"
            )
    return files


def read_records(inputs: Sequence[str | Path]) -> Iterator[Record]:
    """Records of all inputs: each line of a JSONL file (.jsonl, .ndjson), each other file as a whole.

    A .json file that the user names is JSONL too, as Megatron's users have it; one found in a folder is text
    like its neighbours (the package.json of a source tree). Files may be gzipped (.gz). Blank lines are
    passed over.

    Raises:
        DataError: an input is missing or cannot be read.
    """
    for path, is_named in find_files(inputs):
        name = path.name.lower()
        is_json = name.endswith(_JSONL_ENDINGS) or (is_named and name.endswith((".json", ".json.gz")))
        try:
            with _open(path) as stream:
                if not is_json:
                    yield Record(raw=stream.read(), origin=str(path), is_json=False, is_named=is_named)
                    continue
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield Record(raw=line, origin=f"{path}:{number}", is_json=True, is_named=is_named)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {path}: {reason}; check the file and its permissions") from error


def record_text(record: Record, json_keys: Sequence[str]) -> str | None:
    """The document in a record, its JSON keys joined by newlines; ``None`` for a found file without text.

    Raises:
        DataError: not UTF-8, not JSON, or a key is missing or not a string.
    """
    try:
        text = record.raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not record.is_named and not record.is_json:
            return None
        raise DataError(
            f"{record.origin} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv"
        ) from error
    if not record.is_json:
        return None if "\x00" in text and not record.is_named else text
    return _json_text(text, record.origin, json_keys)


def _json_text(line: str, origin: str, keys: Sequence[str]) -> str:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"{origin} is not JSON ({error}); JSONL holds one object per line") from error
    if not isinstance(fields, dict):
        raise DataError(f"{origin} is a JSON {type(fields).__name__}; JSONL holds one object per line")
    parts: list[str] = []
    for key in keys:
        value = fields.get(key)
        if not isinstance(value, str):
            found = "missing" if key not in fields else f"a {type(value).__name__}"
            raise DataError(
                f"{origin}: key {key!r} is {found}, it must be a string; found keys: {', '.join(fields)}"
            )
        parts.append(value)
    return "\n".join(parts)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
