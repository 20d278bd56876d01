"""Encode and decode text with sentencepiece models and Hugging Face tokenizers, without transformers."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_ring.data.text.chat_template import Text
from megatron_ring.data.text.control_text import ControlText, free_mark, without_marks
from megatron_ring.data.text.messages import Message
from megatron_ring.data.text.templates import BAILING_TEMPLATE, CHAT_SYMBOLS, ChatTemplate
from megatron_ring.data.text.tokenizer_files import further_stops, read_bytes, read_settings
from megatron_ring.errors import DataError

TokenizerType = Literal["sentencepiece", "huggingface"]


class Tokenizer(Protocol):
    """What the package needs of a tokenizer.

    Example: a tokenizer of 2048 tokens may have ``eos_id=1``, ``pad_id=1``, ``bos_id=None`` and
    ``encode("a cat") == [97, 1311]``.
    """

    vocab_size: int
    """Largest token id plus one."""
    eos_id: int
    """End of a document, and of an answer."""
    eos_token: str
    """Text of the end of sequence in templates."""
    pad_id: int
    """Id in padding slots; the end of sequence if the tokenizer has no padding token."""
    bos_id: int | None
    """Start of a sequence, if the tokenizer has one."""
    fingerprint: str
    """Hash of the tokenizer's file: equal fingerprints give equal ids."""
    template: ChatTemplate
    stop_tokens: dict[str, int]
    """Text and id of the tokens that end an answer: the end of sequence, and those of generation_config.json."""
    stop_ids: tuple[int, ...]
    """Ids that end a response: those of stop_tokens, and those that the run adds."""
    control_text: tuple[ControlText, ControlText]
    """Tokens that a message must not be encoded to, and those that an answer must not be encoded to."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. No token is added; chat symbols in the text become their own ids.

        Unpaired surrogates (half an emoji, from JSON) become question marks, since UTF-8 cannot encode them.
        """
        ...

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """As :meth:`encode` for a text with marks (see :mod:`megatron_ring.data.text.control_text`), without their ids.

        Raises:
            DataError: this tokenizer merges a mark with other characters.
        """
        ...

    def encode_document(self, text: str) -> list[int]:
        """As :meth:`encode`, but no part of the text becomes a start, end or padding token."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids; start, padding and stop tokens are left out."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        texts: Sequence[Text],
        *,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """The first messages as text, for each of ``texts``; :mod:`megatron_ring.data.text.chat` encodes them."""
        ...


def load_tokenizer(
    tokenizer_type: TokenizerType,
    tokenizer_model: str | Path | None,
    *,
    vocab_size: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Tokenizer:
    """Open a tokenizer.

    Args:
        tokenizer_type: ``sentencepiece`` (a .model file) or ``huggingface`` (tokenizer.json or its folder).
        tokenizer_model: the file or folder.
        vocab_size: the model's vocabulary size; a tokenizer with more tokens is refused.
        chat_template_kwargs: variables for the chat template, for every conversation.
        stop_token_ids: ids that end a response, in addition to the tokenizer's own.

    Raises:
        DataError: no file is named, it is missing, corrupt, without an end-of-sequence token, or has more
            tokens than ``vocab_size``; or its chat template does not read one of the variables.
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
        tokenizer: _Base = SentencePieceTokenizer(path)
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
    tokenizer.stop_at(stop_token_ids)
    tokenizer.template.use(chat_template_kwargs or {})
    return tokenizer


DOCUMENT_MARK = "\ue000"
_MARKUP = re.compile(r"(?!<0x[0-9A-F]{2}>)<[^\s<>]+>")
"""Added tokens that look like markup; sentencepiece's byte tokens are excluded."""
_THINK = ("<think>", "</think>")

_EXPECTED = {
    "sentencepiece": "sentencepiece .model file",
    "huggingface": "tokenizer.json or the folder that holds it",
}


class _Base:
    """Code that both kinds of tokenizer share."""

    template: ChatTemplate
    vocab_size: int
    eos_id: int
    eos_token: str
    pad_id: int
    bos_id: int | None
    fingerprint: str
    stop_tokens: dict[str, int]
    stop_ids: tuple[int, ...]
    control_text: tuple[ControlText, ControlText]

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_marked(self, text: str, mark: str) -> list[int]:
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int]) -> str:
        raise NotImplementedError

    def encode_document(self, text: str) -> list[int]:
        mark = DOCUMENT_MARK if DOCUMENT_MARK not in text else free_mark([text])
        guarded = self._document_text.guard(text, mark, alone=True)
        return self.encode(text) if guarded == text else self.encode_marked(guarded, mark)

    def render(
        self,
        messages: Sequence[Message],
        texts: Sequence[Text],
        *,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        return self.template.render(messages, texts, tools=tools, names=template_kwargs or {})

    def _set_control_text(
        self, control: Iterable[str], kept_in_answers: Iterable[str], document: Iterable[str]
    ):
        strict = ControlText(control)
        self.control_text = (strict, ControlText(set(strict.tokens) - {*_THINK, *kept_in_answers}))
        self._document_text = ControlText(document)

    def stop_at(self, token_ids: Sequence[int]) -> None:
        """End responses at these ids too. Raises DataError for an id outside the vocabulary."""
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"stop_token_ids={token} must be below the tokenizer's {self.vocab_size} tokens; name another"
                )
        self.stop_ids = tuple(dict.fromkeys((*self.stop_tokens.values(), *token_ids)))
        special = (token for token in token_ids if self._text_of(token) in self.control_text[0].tokens)
        self._silent = frozenset(
            (self.eos_id, self.pad_id, self.bos_id, *self.stop_tokens.values(), *special)
        )

    def _text_of(self, token_id: int) -> str:
        raise NotImplementedError


class SentencePieceTokenizer(_Base):
    """A sentencepiece model, with Ling's chat template."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        if path.is_dir():
            raise DataError(f"tokenizer_model={path} is a folder; name the sentencepiece .model file in it")
        content = read_bytes(path)
        self._processor = SentencePieceProcessor()
        try:
            if not content or not self._processor.LoadFromSerializedProto(content):
                raise RuntimeError("empty or unreadable")
        except RuntimeError as error:
            raise DataError(
                f"tokenizer_model={path} is not a sentencepiece model, or is damaged; copy it again, or set "
                "tokenizer_type=huggingface for a tokenizer.json"
            ) from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(f"tokenizer_model={path} has no end-of-sequence token; train it with an eos_id")
        self.eos_token: str = self._processor.id_to_piece(self.eos_id)
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.bos_id: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.template = ChatTemplate(BAILING_TEMPLATE, {"eos_token": self.eos_token}, trusted=True)
        self.stop_tokens = {self.eos_token: self.eos_id}
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        control = [piece for piece in pieces if piece in CHAT_SYMBOLS or _MARKUP.fullmatch(piece)]
        # sentencepiece never encodes text to control pieces; only eos_token is replaced by our own code
        self._set_control_text([*control, self.eos_token], (), [self.eos_token])
        self.stop_at(())

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(_encodable(text))

    def _text_of(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def encode_marked(self, text: str, mark: str) -> list[int]:
        text = _encodable(text)
        found = self._processor.encode(text, return_type="proto").pieces
        size = len(mark.encode())
        # sentencepiece's offsets count bytes
        pieces = text.split(mark)
        ends = itertools.accumulate(len(piece.encode()) + size for piece in pieces[:-1])
        spans = [(piece.begin, piece.end) for piece in found]
        return without_marks([piece.id for piece in found], spans, [end - size for end in ends], size)

    def decode(self, token_ids: Sequence[int]) -> str:
        silent = self._silent
        # ids of padded vocabulary rows can be sampled, but have no text
        return self._processor.decode(
            [int(i) for i in token_ids if i not in silent and 0 <= i < self.vocab_size]
        )


class HuggingFaceTokenizer(_Base):
    """A tokenizer.json, with the special tokens and chat template of its folder."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"tokenizer_model={path} contains no tokenizer.json; save the fast tokenizer there"
            )
        content = read_bytes(file)
        try:
            self._tokenizer = FastTokenizer.from_buffer(content)
        except Exception as error:  # the Rust library raises plain Exception for every error
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"{file} is not a Hugging Face tokenizer ({reason}); copy it again, "
                "or set tokenizer_type=sentencepiece for a .model file"
            ) from error
        # truncation and padding settings in the file would change documents
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._file = file
        self._special_tokens, template = read_settings(file.parent)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_id = self._special_id("eos_token")
        self.eos_token = self._special_tokens["eos_token"]
        self.pad_id = self._special_id("pad_token") if "pad_token" in self._special_tokens else self.eos_id
        self.bos_id = self._special_id("bos_token") if "bos_token" in self._special_tokens else None
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.template = ChatTemplate(template, self._special_tokens, where=str(file))
        self.stop_tokens = {
            self.eos_token: self.eos_id,
            **further_stops(file.parent, self._tokenizer.id_to_token),
        }
        self._find_control_text(template or "")
        self.stop_at(())

    def _find_control_text(self, template: str) -> None:
        """Special tokens, and added ones that the template writes or that look like markup (<tool_call>)."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special} | {*self._special_tokens.values()}
        plain = {token.content for token in added} - special
        marks = {
            token for token in plain if token in template or token in CHAT_SYMBOLS or _MARKUP.fullmatch(token)
        }
        ends = {value for name, value in self._special_tokens.items() if name != "unk_token"}
        self._set_control_text(special | marks, marks, ends | {*self.stop_tokens})

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(_encodable(text), add_special_tokens=False).ids

    def _text_of(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def encode_marked(self, text: str, mark: str) -> list[int]:
        text = _encodable(text)
        found = self._tokenizer.encode(text, add_special_tokens=False)
        marks = [place for place, character in enumerate(text) if character == mark]
        return without_marks(found.ids, found.offsets, marks, 1)

    def decode(self, token_ids: Sequence[int]) -> str:
        silent = self._silent
        known = [int(i) for i in token_ids if i not in silent and 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def _special_id(self, name: str) -> int:
        token = self._special_tokens.get(name)
        if token is None:
            raise DataError(
                f"no {name} is named in the folder of {self._file}; put tokenizer_config.json or "
                "special_tokens_map.json there"
            )
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise DataError(f"{name} {token!r} is not in {self._file}; copy the files of its folder again")
        return token_id


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text
