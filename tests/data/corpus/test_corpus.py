from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.corpus.corpus import open_corpus, parse_split
from megatron_ring.data.text.tokenizer import SentencePieceTokenizer
from megatron_ring.errors import DataError
from tests.helpers.data.memory import share_of, split_of


def test_a_split_is_normalised_and_filled_up():
    assert parse_split("949,50,1") == (0.949, 0.05, 0.001)
    assert parse_split("1") == (1, 0, 0)
    assert parse_split("3, 1") == (0.75, 0.25, 0)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan", "inf,1"])
def test_a_split_that_is_none_is_refused(split: str):
    with pytest.raises(DataError, match=r'split=.*must be up to three shares .* e\.g\. "949,50,1"'):
        parse_split(split)


def test_weights_of_a_split_are_exact_and_sum_to_one(write_documents: Callable[..., str]):
    first, second = write_documents([[5, 1]], name="first"), write_documents([[6, 1]], name="second")
    train = open_corpus(["0.1", first, "0.2", second], "1").train
    assert train.weights == (Fraction(1, 3), Fraction(2, 3))


def test_splits_are_disjoint_and_leave_nothing_out(write_documents: Callable[..., str]):
    prefix = write_documents([[i, 1] for i in range(10)])
    splits = open_corpus([prefix], "6,3,1")
    bounds = [
        (split.shares[0].first_document, split.shares[0].end_document)
        for split in (splits.train, splits.valid, splits.test)
    ]
    assert bounds == [(0, 6), (6, 9), (9, 10)]
    assert (splits.train.num_documents, splits.train.num_tokens) == (6, 12)


@given(parts=st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any), num=st.integers(1, 5000))
def test_splits_fall_where_megatron_puts_them(parts: list[int], num: int):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    text = ",".join(map(str, parts))
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))
    shares = parse_split(text)
    for i, bookends in enumerate(matrix):
        ours = [round(sum(shares[:i]) * num), round(sum(shares[: i + 1]) * num)]
        assert ours[0] == ours[1] if bookends is None else ours == [round(end * num) for end in bookends]


def test_a_blend_keeps_its_weights_in_every_split(write_documents: Callable[..., str]):
    a, b = write_documents([[1]] * 4, name="a"), write_documents([[1]] * 8, name="b")
    splits = open_corpus(["3", a, "1", b], "1,1")
    assert splits.valid.weights == (Fraction(3, 4), Fraction(1, 4))
    assert [share.num_documents for share in splits.valid.shares] == [2, 4]


def test_another_tokenizers_corpus_is_refused(
    write_documents: Callable[..., str], sentencepiece: SentencePieceTokenizer
):
    note = {"tokenizer_fingerprint": "0" * 64, "tokenizer_model": "other.model", "vocab_size": 32000}
    prefix = write_documents([[1, 2]], **note)
    assert open_corpus([prefix], "1").train.num_tokens == 2
    with pytest.raises(
        DataError, match=r"made with another tokenizer \(other.model, 32000 tokens\) than this run's \(600"
    ):
        open_corpus([prefix], "1", tokenizer=sentencepiece)
    prefix = write_documents([[1, 2]], tokenizer_fingerprint=sentencepiece.fingerprint)
    assert open_corpus([prefix], "1", tokenizer=sentencepiece).train.num_tokens == 2


def test_a_corpus_without_tokens_is_refused(write_documents: Callable[..., str], tmp_path: Path):
    prefix = write_documents([])
    with pytest.raises(DataError, match=r"corpus\.bin holds no tokens; preprocess at least one document"):
        open_corpus([prefix], "1")


def test_a_fingerprint_tells_corpora_apart():
    a, b = share_of([1, 2], [3]), share_of([1, 2], [3, 4])
    third = [Fraction(1, 3), Fraction(2, 3)]
    prints = {
        split.fingerprint
        for split in (split_of(a), split_of(b), split_of(a, b), split_of(a, b, weights=third))
    }
    assert len(prints) == 4
    assert split_of(share_of([7, 8], [9])).fingerprint == split_of(a).fingerprint
