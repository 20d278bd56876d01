import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.corpus.corpus import CorpusShare
from megatron_ring.data.corpus.document_samples import DocumentSamples
from megatron_ring.errors import DataError
from tests.helpers.data.memory import share_of


def distinct_documents(lengths: list[int]) -> CorpusShare:
    """Documents in which every token is another: 0, 1, 2, ..."""
    ends = np.cumsum(lengths)
    return share_of(*(range(end - length, end) for end, length in zip(ends, lengths, strict=True)))


def samples_of(share: CorpusShare, seq_length: int, seed: int = 3, place: int = 0) -> DocumentSamples:
    return DocumentSamples(share, seq_length=seq_length, seed=seed, place=place, split="train")


corpora = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) >= 8)


@given(lengths=corpora, seq_length=st.integers(1, 7), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_reads_every_token_once_but_for_a_tail(
    lengths: list[int], seq_length: int, seed: int, epoch: int
):
    samples = samples_of(distinct_documents(lengths), seq_length, seed)
    n = samples.samples_per_epoch
    inputs = [token for i in range(n) for token in samples.read(epoch * n + i)[0][:-1].tolist()]
    assert len(set(inputs)) == len(inputs) == n * seq_length
    assert sum(lengths) - len(inputs) <= seq_length


@given(lengths=corpora, seq_length=st.integers(1, 7), index=st.integers(0, 100))
def test_documents_run_on_unbroken_and_their_ends_are_known(lengths: list[int], seq_length: int, index: int):
    tokens, ends = samples_of(distinct_documents(lengths), seq_length).read(index)
    last_tokens = {int(end) - 1 for end, length in zip(np.cumsum(lengths), lengths, strict=True) if length}
    assert len(tokens) == seq_length + 1
    assert ends.tolist() == [i + 1 for i, token in enumerate(tokens.tolist()) if token in last_tokens]
    for here, there in zip(tokens.tolist(), tokens[1:].tolist(), strict=False):
        assert here in last_tokens or there == here + 1


@pytest.mark.parametrize("index", range(9))
def test_a_share_reads_its_own_documents_only(index: int):
    whole = distinct_documents([2, 5, 3, 6, 9])
    share = CorpusShare(corpus=whole.corpus, first_document=1, end_document=4)
    tokens, ends = samples_of(share, 4).read(index)
    assert set(tokens.tolist()) <= set(range(2, 16))
    assert ends.tolist() == [i + 1 for i, token in enumerate(tokens.tolist()) if token in (6, 9, 15)]


def test_documents_are_put_end_to_end_anew_in_each_epoch():
    share = distinct_documents([2] * 30)
    samples = samples_of(share, 58)
    assert samples.samples_per_epoch == 1
    orders = [tuple(samples.read(epoch)[0][::2].tolist()) for epoch in range(4)]
    assert len(set(orders)) == 4


def test_samples_of_one_document_are_not_read_in_its_order():
    samples = samples_of(distinct_documents([200]), 5)
    for epoch in range(3):
        n = samples.samples_per_epoch
        starts = [int(samples.read(epoch * n + i)[0][0]) for i in range(n)]
        assert starts != sorted(starts) == list(range(0, 195, 5))


def test_epochs_seeds_and_places_in_a_blend_have_their_own_order():
    share = distinct_documents([4] * 20)

    def order(seed: int, place: int, epoch: int) -> tuple[int, ...]:
        samples = samples_of(share, 4, seed, place)
        n = samples.samples_per_epoch
        return tuple(int(samples.read(epoch * n + i)[0][0]) for i in range(n))

    assert len({order(0, 0, 0), order(0, 0, 1), order(1, 0, 0), order(0, 1, 0)}) == 4
    assert order(1, 0, 5) == order(1, 0, 5)


def test_reading_order_does_not_matter():
    share = distinct_documents([3, 9, 1, 4, 8])
    forward, backward = samples_of(share, 5), samples_of(share, 5)
    expected = [forward.read(i)[0].tolist() for i in range(20)]
    assert [backward.read(i)[0].tolist() for i in reversed(range(20))] == expected[::-1]


def test_splits_without_a_sample_are_refused():
    empty = CorpusShare(corpus=distinct_documents([4, 4]).corpus, first_document=2, end_document=2)
    with pytest.raises(DataError, match="train split of in-memory is empty: none of its 2 documents"):
        samples_of(empty, 2)
    with pytest.raises(
        DataError, match=r"has 8 tokens, a sample needs seq_length\+1=9; raise .* lower seq_length"
    ):
        samples_of(distinct_documents([4, 4]), 8)
    assert samples_of(distinct_documents([4, 4]), 7).samples_per_epoch == 1
