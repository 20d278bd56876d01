"""Train a sentencepiece BPE tokenizer on documents."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_ring.data.files import written_whole
from megatron_ring.data.text.templates import CHAT_SYMBOLS
from megatron_ring.errors import DataError

EOS_PIECE = "<|endoftext|>"
"""End of sequence, and padding, as in Ling and Ring."""

# unknown, end of sequence, chat symbols and one piece per byte
_MIN_VOCAB_SIZE = 2 + len(CHAT_SYMBOLS) + 256
_MAX_CHUNK = 4096


def train_tokenizer(
    documents: Iterable[str],
    path: str | Path,
    *,
    vocab_size: int,
    split_digits: bool = True,
    symbols: Sequence[str] = (),
) -> int:
    """Train on documents and write a complete .model file or none. The same input gives the same bytes.

    Encoding and decoding do not change a text: no normalisation, all white space kept, unseen characters as bytes.
    Reserved tokens: the end of sequence and the chat symbols of :data:`~megatron_ring.data.text.templates.CHAT_SYMBOLS`.

    Args:
        documents: text; read once, and held in memory.
        path: of the .model file.
        vocab_size: number of tokens.
        split_digits: each digit is its own token, so that a number's tokens do not depend on its context.
        symbols: other strings that are always one token, such as ``\\boxed{``.

    Returns:
        Number of tokens in the vocabulary.

    Raises:
        DataError: there is too little text for the vocabulary, the vocabulary is too small, or the file cannot be
            written.
    """
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    reserved = _reserved(symbols, vocab_size)
    model = io.BytesIO()
    # read everything before training: the trainer would replace the reader's error with its own
    chunks = list(_chunks(documents))
    if not chunks:
        raise DataError("the input contains no text to train a tokenizer on; check --input")
    with written_whole(path) as (temporary,):
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(chunks),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=split_digits,
                character_coverage=0.9995,
                # the text is not changed
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=16 * _MAX_CHUNK,
                user_defined_symbols=reserved,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                eos_piece=EOS_PIECE,
                # the number is stored in the file, and more threads are not faster
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _explained(error, vocab_size) from error
        temporary.write_bytes(model.getvalue())
    return SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()


def _reserved(symbols: Sequence[str], vocab_size: int) -> list[str]:
    """The chat symbols and ``symbols``, once each. Raises DataError if the vocabulary has no room for other tokens."""
    # sentencepiece matches symbols in text whose spaces it has replaced
    spaced = [symbol.replace(" ", "\u2581") for symbol in symbols]
    reserved = list(dict.fromkeys([*CHAT_SYMBOLS, *spaced]))
    if "" in reserved:
        raise DataError("a symbol is empty; name a string that must be one token")
    least = _MIN_VOCAB_SIZE + len(reserved) - len(CHAT_SYMBOLS)
    if vocab_size < least + 1:
        raise DataError(f"vocab_size={vocab_size} must exceed the {least} reserved tokens; try 2048")
    return reserved


def _chunks(documents: Iterable[str]) -> Iterator[bytes]:
    """Documents in pieces of a few kilobytes, cut at line ends if possible: the trainer drops longer pieces."""
    for document in documents:
        chunk = ""
        for line in document.splitlines(keepends=True):
            if chunk and len(chunk) + len(line) > _MAX_CHUNK:
                yield chunk.encode("utf-8", "replace")
                chunk = ""
            chunk += line
            while len(chunk) > _MAX_CHUNK:
                yield chunk[:_MAX_CHUNK].encode("utf-8", "replace")
                chunk = chunk[_MAX_CHUNK:]
        if chunk:
            yield chunk.encode("utf-8", "replace")


def _explained(error: RuntimeError, vocab_size: int) -> DataError:
    reason = " ".join(str(error).split())
    if found := re.search(r"too high .* value <= (\d+)", reason):
        return DataError(
            f"vocab_size={vocab_size} is more than the text supports; set at most {found[1]}, or add text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        return DataError(
            f"vocab_size={vocab_size} has no room for the text's characters; set more than {found[1]}"
        )
    return DataError(f"sentencepiece cannot train vocab_size={vocab_size}: {reason}; check the input")
