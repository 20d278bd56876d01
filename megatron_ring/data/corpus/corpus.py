"""The pre-training corpus: one indexed dataset or a weighted blend of several, split by documents."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_ring.config.blend import parse_blend
from megatron_ring.data.corpus.indexed import IndexedCorpus, open_indexed
from megatron_ring.data.text.tokenizer import Tokenizer
from megatron_ring.errors import DataError


@dataclass(frozen=True, kw_only=True)
class CorpusShare:
    """The documents of one indexed dataset that belong to a split: ``[first_document, end_document)``."""

    corpus: IndexedCorpus
    first_document: int
    end_document: int

    @property
    def num_documents(self) -> int:
        return self.end_document - self.first_document

    @property
    def num_tokens(self) -> int:
        offsets = self.corpus.offsets
        return int(offsets[self.end_document] - offsets[self.first_document])


@dataclass(frozen=True, kw_only=True)
class CorpusSplit:
    """Training, validation or test documents, and the sampling weight of each dataset.

    Example: ``data_path=("3", "code", "1", "web")`` gives two shares with weights 3/4 and 1/4.
    """

    name: str
    shares: tuple[CorpusShare, ...]
    weights: tuple[Fraction, ...]
    """One per share; they sum to 1."""

    @property
    def num_documents(self) -> int:
        return sum(share.num_documents for share in self.shares)

    @property
    def num_tokens(self) -> int:
        return sum(share.num_tokens for share in self.shares)

    @property
    def fingerprint(self) -> str:
        """Hash of sizes and weights. It differs for another corpus, blend or split; moving the files does not change it."""
        facts = [
            (
                share.corpus.num_documents,
                share.corpus.num_tokens,
                share.first_document,
                share.end_document,
                str(weight),
            )
            for share, weight in zip(self.shares, self.weights, strict=True)
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class CorpusSplits:
    """The three splits. A split without documents is an error only if a stream is made of it."""

    train: CorpusSplit
    valid: CorpusSplit
    test: CorpusSplit


def open_corpus(data_path: Sequence[str], split: str, *, tokenizer: Tokenizer | None = None) -> CorpusSplits:
    """Open the datasets of a blend; split each by documents, in their order on disk, as Megatron does.

    Args:
        data_path: ``(prefix,)`` or ``(weight, prefix, weight, prefix, ...)``.
        split: shares of documents for training, validation and test, e.g. ``"949,50,1"``.
        tokenizer: the run's; a corpus whose manifest names another tokenizer is refused.

    Raises:
        ConfigError: data_path is no blend.
        DataError: it is empty, the split cannot be parsed, a file is missing or damaged, or the tokenizer differs.
    """
    names = ("train", "valid", "test")
    shares_of_split = parse_split(split)
    blend = parse_blend("data_path", data_path, "prefix")
    total = sum((weight for weight, _ in blend), Fraction(0))
    corpora = [open_indexed(prefix) for _, prefix in blend]
    for corpus in corpora:
        if not corpus.num_tokens:
            raise DataError(f"{corpus.prefix}.bin holds no tokens; preprocess at least one document into it")
        if tokenizer is not None:
            _require_tokenizer(corpus, tokenizer)
    ends = [sum(shares_of_split[: i + 1]) for i in range(3)]
    splits: dict[str, CorpusSplit] = {}
    for name, begin, end in zip(names, [0.0, *ends[:-1]], ends, strict=True):
        splits[name] = CorpusSplit(
            name=name,
            shares=tuple(
                CorpusShare(
                    corpus=corpus,
                    first_document=min(round(begin * corpus.num_documents), corpus.num_documents),
                    end_document=min(round(end * corpus.num_documents), corpus.num_documents),
                )
                for corpus in corpora
            ),
            weights=tuple(weight / total for weight, _ in blend),
        )
    return CorpusSplits(**splits)


def parse_split(split: str) -> tuple[float, float, float]:
    """Normalised shares of train, valid and test: ``"949,50,1"`` is ``(0.949, 0.05, 0.001)``.

    Raises:
        DataError: not one to three non-negative numbers with a positive sum.
    """
    rule = 'split must be up to three shares with a positive sum, e.g. "949,50,1"'
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        raise DataError(f"split={split!r} contains something that is not a number; {rule}") from None
    if len(parts) > 3 or not all(part >= 0 and math.isfinite(part) for part in parts) or sum(parts) <= 0:
        raise DataError(f"split={split!r} is not a split; {rule}")
    train, valid, test = (part / sum(parts) for part in (*parts, 0.0, 0.0)[:3])
    return train, valid, test


def _require_tokenizer(corpus: IndexedCorpus, tokenizer: Tokenizer) -> None:
    made_with = corpus.manifest.get("tokenizer_fingerprint")
    if made_with is not None and made_with != tokenizer.fingerprint:
        name, size = corpus.manifest.get("tokenizer_model", "unnamed"), corpus.manifest.get("vocab_size", "?")
        raise DataError(
            f"{corpus.prefix}.bin was made with another tokenizer ({name}, {size} tokens) than this run's "
            f"({tokenizer.vocab_size} tokens); preprocess it again or set tokenizer_model"
        )
