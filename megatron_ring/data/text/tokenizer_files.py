"""Files in a tokenizer's folder: special tokens, chat template and stop tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ring.data.json_text import parse_json
from megatron_ring.errors import DataError
from megatron_ring.plain import read_plain


def read_settings(folder: Path) -> tuple[dict[str, str], str | None]:
    """Special tokens by name, and the chat template, from the folder of a tokenizer.json."""
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            tokens[name] = value
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        return tokens, read_bytes(template_file).decode("utf-8-sig", "replace")
    template = settings.get("chat_template")
    if isinstance(template, list):
        default = (item for item in template if isinstance(item, dict) and item.get("name") == "default")
        template = next(default, {}).get("template")
    return tokens, template if isinstance(template, str) else None


def further_stops(folder: Path, text_of: Callable[[int], str | None]) -> dict[str, int]:
    """Text and id of each end of sequence in generation_config.json and config.json.

    Raises:
        DataError: an id is not a token of the tokenizer (its ``text_of`` returns None).
    """
    found: dict[str, int] = {}
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is None:
                continue
            text = text_of(token_id) if _is_id(token_id) else None
            if text is None:
                raise DataError(
                    f"{folder / name}: eos_token_id={token_id!r} is not a token of the tokenizer in that folder; correct it"
                )
            found[text] = token_id
    return found


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = parse_json(read_bytes(path), str(path), "copy the tokenizer again")
    if not isinstance(content, dict):
        raise DataError(f"{path} is a JSON {type(content).__name__}, not an object; copy the tokenizer again")
    return content


def read_bytes(path: Path) -> bytes:
    """The file's content. Raises DataError if it cannot be read."""
    try:
        return read_plain(path)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; check the file and its permissions"
        ) from error


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
