"""Text to token ids and back: sentencepiece models and Hugging Face tokenizers, without transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_ring.data.chat import BAILING_TEMPLATE, Message, render_template
from megatron_ring.errors import DataError

TokenizerType = Literal["sentencepiece", "huggingface"]


class Tokenizer(Protocol):
    """What the package asks of a tokenizer.

    Example: a tokenizer of 2048 tokens may have ``eos_id=1``, ``pad_id=1``, ``bos_id=None`` and
    ``encode("a cat") == [97, 1311]``.
    """

    vocab_size: int
    """Largest token id plus one."""
    eos_id: int
    """End of a document, and of an answer."""
    eos_token: str
    """The end of sequence as templates spell it."""
    pad_id: int
    """Fills slots that hold no token; the end of sequence where the tokenizer has no padding token of its
    own."""
    bos_id: int | None
    """Start of a sequence, for tokenizers that have one."""
    fingerprint: str
    """Hash of the tokenizer's file: equal fingerprints give equal ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. No token is added; chat symbols in the text become their own ids.

        Unpaired surrogates (half an emoji, from JSON) become question marks: UTF-8 cannot say them.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids; end, padding and start of sequence give none."""
        ...

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text; :func:`~megatron_ring.data.chat.render_chat` gives its ids."""
        ...


def load_tokenizer(
    tokenizer_type: TokenizerType, tokenizer_model: str | Path | None, *, vocab_size: int | None = None
) -> Tokenizer:
    """Open a tokenizer.

    Args:
        tokenizer_type: ``sentencepiece`` (a .model file) or ``huggingface`` (tokenizer.json or its folder).
        tokenizer_model: the file or folder.
        vocab_size: the model's vocabulary, if the tokenizer is to fit one.

    Raises:
        DataError: no file is named, it is missing, corrupt, without an end-of-sequence token, or has more
            tokens than ``vocab_size``.
    """
    if not tokenizer_model:
        raise DataError("tokenizer_model is not set; name a file, or make one with tools/train_tokenizer.py")
    path = Path(tokenizer_model)
    if not path.exists():
        raise DataError(
            f"tokenizer_model={path} does not exist; name a {_EXPECTED.get(tokenizer_type, 'tokenizer')}, "
            "or make one with tools/train_tokenizer.py"
        )
    if tokenizer_type == "sentencepiece":
        tokenizer: Tokenizer = SentencePieceTokenizer(path)
    elif tokenizer_type == "huggingface":
        tokenizer = HuggingFaceTokenizer(path)
    else:
        raise DataError(f"tokenizer_type={tokenizer_type} is unknown; use {' or '.join(_EXPECTED)}")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer_model={path} has {tokenizer.vocab_size} tokens, more than the "
            f"model's vocab_size={vocab_size}; set vocab_size={tokenizer.vocab_size} or use the tokenizer "
            "that the model was made for"
        )
    return tokenizer


_EXPECTED = {
    "sentencepiece": "sentencepiece .model file",
    "huggingface": "tokenizer.json or the folder that holds it",
}


class SentencePieceTokenizer:
    """A sentencepiece model, with Ling's chat template."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        if path.is_dir():
            raise DataError(f"tokenizer_model={path} is a folder; name the sentencepiece .model file in it")
        content = _read(path)
        self._processor = SentencePieceProcessor()
        try:
            if not content or not self._processor.LoadFromSerializedProto(content):
                raise RuntimeError("empty or unreadable")
        except RuntimeError as error:
            raise DataError(
                f"tokenizer_model={path} is not a sentencepiece model, or a broken one; copy it again, or "
                "set tokenizer_type=huggingface for a tokenizer.json"
            ) from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(f"tokenizer_model={path} has no end-of-sequence token; train it with an eos_id")
        self.eos_token: str = self._processor.id_to_piece(self.eos_id)
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.bos_id: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(_sayable(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        silent = {self.eos_id, self.pad_id, self.bos_id}
        # rows of a padded embedding beyond the vocabulary can be sampled, but have no text
        return self._processor.decode(
            [int(i) for i in token_ids if i not in silent and 0 <= i < self.vocab_size]
        )

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return render_template(
            BAILING_TEMPLATE,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens={"eos_token": self.eos_token},
        )


class HuggingFaceTokenizer:
    """A tokenizer.json, with the special tokens and chat template that lie beside it."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"tokenizer_model={path} holds no tokenizer.json; save the fast tokenizer there")
        content = _read(file)
        try:
            self._tokenizer = FastTokenizer.from_buffer(content)
        except Exception as error:  # the Rust library raises bare Exception, whatever is wrong
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"{file} is not a Hugging Face tokenizer ({reason}); copy it again, "
                "or set tokenizer_type=sentencepiece for a .model file"
            ) from error
        # batching settings stored in the file would cut or pad documents
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._file = file
        self._special_tokens, self._template = _read_settings(file.parent)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_id = self._special_id("eos_token")
        self.eos_token = self._special_tokens["eos_token"]
        self.pad_id = self._special_id("pad_token") if "pad_token" in self._special_tokens else self.eos_id
        self.bos_id = self._special_id("bos_token") if "bos_token" in self._special_tokens else None
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(_sayable(text), add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        silent = {self.eos_id, self.pad_id, self.bos_id}
        known = [int(i) for i in token_ids if i not in silent and 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        if self._template is None:
            raise DataError(
                f"no chat template beside {self._file}; put chat_template.jinja or a tokenizer_config.json "
                "with chat_template there"
            )
        return render_template(
            self._template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._special_tokens,
        )

    def _special_id(self, name: str) -> int:
        token = self._special_tokens.get(name)
        if token is None:
            raise DataError(
                f"no {name} is named beside {self._file}; put tokenizer_config.json or "
                "special_tokens_map.json there"
            )
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise DataError(f"{name} {token!r} is not in {self._file}; copy the files beside it again")
        return token_id


def _sayable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _read_settings(folder: Path) -> tuple[dict[str, str], str | None]:
    """Special tokens by name, and the chat template, from the files beside a tokenizer.json."""
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            tokens[name] = value
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        return tokens, _read(template_file).decode("utf-8", "replace")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return tokens, template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); copy the tokenizer again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is a JSON {type(content).__name__}, not an object; copy the tokenizer again")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; check the file and its permissions"
        ) from error
