"""Read documents from JSONL files, text files and folders of them.

There are two steps, so that worker processes can do the second one: :func:`read_records` yields raw records in a
deterministic order, :func:`record_text` decodes one record into its document.
"""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from megatron_ring.data.json_text import parse_json
from megatron_ring.errors import DataError

MAX_LINE_BYTES = 1 << 28
"""Longest line of JSONL; a longer one comes from a file without line ends, or from an attack on memory."""
MAX_UNPACKED_BYTES = 1 << 30
"""Largest size of a gzipped document after unpacking: a few kilobytes can unpack to any size."""

_JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One document as it is stored on disk.

    Example: ``Record(raw=b'{"text": "One."}', origin="web.jsonl:1", is_json=True, is_named=True)``.
    """

    raw: bytes
    """UTF-8 text or a line of JSON; a whole file may also be UTF-16 or UTF-32 with a byte order mark."""
    origin: str
    """File, and line for JSONL, for messages."""
    is_json: bool
    """``raw`` is a JSON object with the text under some of its keys."""
    is_named: bool
    """The user named this file; a file found in a folder may turn out not to be text."""


def find_files(inputs: Sequence[str | Path]) -> list[tuple[Path, bool]]:
    """The files to read, in order, and for each whether the user named it. Hidden files are left out.

    Raises:
        DataError: an input is missing, or a folder holds no files.
    """
    files: list[tuple[Path, bool]] = []
    for item in map(Path, inputs):
        if item.is_dir():
            found = sorted(path for path in item.rglob("*") if path.is_file() and not _is_hidden(path, item))
            if not found:
                raise DataError(
                    f"input folder {item} contains no files; name a folder of text or JSONL files"
                )
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

    A .json file that the user names is read as JSONL, as in Megatron; one found in a folder is text (the package.json
    of a source tree). Files may be gzipped (.gz). Blank lines are skipped. A byte order mark of UTF-8, UTF-16 or UTF-32
    sets the encoding.

    Raises:
        DataError: an input is missing or cannot be read.
    """
    for path, is_named in find_files(inputs):
        name = path.name.lower()
        is_json = name.endswith(_JSONL_ENDINGS) or (is_named and name.endswith((".json", ".json.gz")))
        try:
            with _open(path) as stream:
                if not is_json:
                    yield Record(raw=_whole(stream, path), origin=str(path), is_json=False, is_named=is_named)
                    continue
                for number, line in enumerate(_lines(stream, path), start=1):
                    if line.strip():
                        yield Record(raw=line, origin=f"{path}:{number}", is_json=True, is_named=is_named)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {path}: {reason}; check the file and its permissions") from error


def record_text(record: Record, json_keys: Sequence[str]) -> str | None:
    """The document in a record: its JSON keys joined by newlines. ``None`` for a file of a folder that is not text.

    Raises:
        DataError: not UTF-8, not JSON, or a key is missing or not a string.
    """
    encoding = _encoding(record.raw[:4])
    try:
        text = record.raw.decode(encoding)
    except UnicodeDecodeError as error:
        if not record.is_named and not record.is_json:
            return None
        known = (
            "UTF-8" if encoding == "utf-8-sig" else f"{encoding.upper()}, which its byte order mark declares"
        )
        raise DataError(
            f"{record.origin} is not {known} (byte {error.start}); convert it, e.g. with iconv"
        ) from error
    if not record.is_json:
        if "\x00" in text and record.is_named and _is_wide(record.raw):
            raise _unmarked(record.origin)
        return None if "\x00" in text and not record.is_named else text
    return _json_text(text, record.origin, json_keys)


def _json_text(line: str, origin: str, keys: Sequence[str]) -> str:
    fields = parse_json(line, origin, "JSONL holds one object per line")
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


def _encoding(first: bytes) -> str:
    """The encoding that a file's byte order mark declares; UTF-8 without a mark."""
    # UTF-32 first: its mark begins with that of UTF-16
    if first.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a file as UTF-8. Raises DataError for UTF-16 without a byte order mark or with a wrong one."""
    buffered = cast(io.BufferedReader, stream)
    first = buffered.peek(4)[:512]
    encoding = _encoding(first[:4])
    if encoding == "utf-8-sig":
        if _is_wide(first):
            raise _unmarked(str(path))
        if first.startswith(codecs.BOM_UTF8):
            buffered.read(len(codecs.BOM_UTF8))
        for line in iter(lambda: buffered.readline(MAX_LINE_BYTES + 1), b""):
            yield _short_enough(line, path)
        return
    wide = io.TextIOWrapper(buffered, encoding=encoding, newline="\n")
    try:
        for line in iter(lambda: wide.readline(MAX_LINE_BYTES + 1), ""):
            yield _short_enough(line.encode("utf-8", "surrogatepass"), path)
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"{path} is not {encoding.upper()}, which its byte order mark declares ({reason}); convert it to UTF-8"
        ) from None


def _short_enough(line: bytes, path: Path) -> bytes:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"{path} has a line of more than {MAX_LINE_BYTES >> 20} MiB; write one JSON object per line"
        )
    return line


def _whole(stream: BinaryIO, path: Path) -> bytes:
    if path.suffix != ".gz":
        return stream.read()
    raw = stream.read(MAX_UNPACKED_BYTES + 1)
    if len(raw) > MAX_UNPACKED_BYTES:
        raise DataError(
            f"{path} unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB; unpack it, or write its documents as JSONL"
        )
    return raw


def _is_wide(raw: bytes) -> bool:
    """Is every second byte at the beginning 0, as in Latin text in UTF-16?"""
    return len(raw) >= 4 and not (any(raw[1:64:2]) and any(raw[0:64:2]))


def _unmarked(name: str) -> DataError:
    return DataError(
        f"{name} is UTF-16 without a byte order mark; convert it to UTF-8, e.g. with iconv -f UTF-16LE -t UTF-8"
    )


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
