import json
from dataclasses import astuple
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.corpus.corpus import CorpusSplit
from megatron_ring.data.corpus.pretrain_stream import PretrainSample, PretrainStream, SampleCursor
from megatron_ring.errors import DataError
from tests.helpers.data.memory import share_of, split_of

EOD = 1


def as_lists(sample: PretrainSample) -> list[list[float]]:
    return [list(column) for column in astuple(sample)]


def counting_split(num_documents: int = 12, length: int = 7) -> CorpusSplit:
    """Documents of tokens that count up from 10, each ended."""
    return split_of(
        share_of(*([*range(10 * d, 10 * d + length - 1), EOD] for d in range(1, num_documents + 1)))
    )


def test_docstring_example():
    split = split_of(share_of([7, 8, EOD], [9, EOD], [5, 6]))
    # a seed whose order is that of the files
    sample = PretrainStream(split, seq_length=6, seed=7).sample(0)
    assert as_lists(sample) == [
        [7, 8, 1, 9, 1, 5],
        [8, 1, 9, 1, 5, 6],
        [1, 1, 0, 1, 0, 1],
        [3, 2, 1],
    ]
    assert (sample.tokens.dtype, sample.labels.dtype, sample.loss_mask.dtype) == (
        np.int64,
        np.int64,
        np.float32,
    )


@given(seq_length=st.integers(1, 40), index=st.integers(0, 50), seed=st.integers(0, 3))
def test_segments_are_the_documents_parts(seq_length: int, index: int, seed: int):
    sample = PretrainStream(counting_split(), seq_length=seq_length, seed=seed).sample(index)
    assert sum(sample.segment_lengths) == seq_length
    ends = np.cumsum(sample.segment_lengths)
    # all but the last segment end with a document, and no document ends elsewhere
    assert np.flatnonzero(sample.tokens[:-1] == EOD).tolist() == [end - 1 for end in ends[:-1]]
    assert sample.loss_mask.tolist() == [float(token != EOD) for token in sample.tokens]
    assert sample.labels[:-1].tolist() == sample.tokens[1:].tolist()


def test_ends_are_known_without_an_end_of_document_token():
    split = split_of(share_of([5, 6, 7], [8, 9, 10]))
    sample = PretrainStream(split, seq_length=5, seed=0).sample(0)
    assert sample.segment_lengths == (3, 2)
    assert sample.loss_mask.tolist() == [1, 1, 0, 1, 1]


def test_a_document_that_ends_with_the_sample_leaves_no_empty_segment():
    split = split_of(share_of([5, 6, EOD], [8, 9, EOD]))
    sample = PretrainStream(split, seq_length=3, seed=0).sample(0)
    assert sample.segment_lengths == (3,)
    assert sample.loss_mask.tolist() == [1, 1, 0]


def test_without_reset_documents_flow_into_each_other():
    sample = PretrainStream(counting_split(), seq_length=20, seed=0, reset_at_document=False).sample(2)
    assert sample.segment_lengths == (20,)
    assert sample.loss_mask.min() == 1


def test_a_blend_draws_by_weight():
    ones, twos = share_of([1] * 50), share_of([2] * 200)
    stream = PretrainStream(
        split_of(ones, twos, weights=[Fraction(3, 4), Fraction(1, 4)]), seq_length=4, seed=0
    )
    drawn = [int(sample.tokens[0]) for sample in stream.samples(range(100))]
    assert (drawn.count(1), drawn.count(2)) == (75, 25)
    assert stream.samples_per_epoch == 12 + 49


def test_a_batch_is_a_pure_function_of_seed_and_index():
    stream = PretrainStream(counting_split(), seq_length=8, seed=5)
    assert stream.samples_per_epoch < 25, "the batches below reach into a second and third epoch"
    whole = [as_lists(sample) for sample in stream.samples(range(30))]
    again = PretrainStream(counting_split(), seq_length=8, seed=5)
    assert [as_lists(sample) for sample in again.samples(range(17, 26))] == whole[17:26]
    ranks = [again.samples(range(8 + 3 * rank, 11 + 3 * rank)) for rank in range(4)]
    assert [as_lists(sample) for rank in ranks for sample in rank] == whole[8:20]
    assert [
        as_lists(s) for s in PretrainStream(counting_split(), seq_length=8, seed=6).samples(range(30))
    ] != whole


def test_prefetched_samples_are_the_same():
    plain = PretrainStream(counting_split(), seq_length=8, seed=5)
    threaded = PretrainStream(counting_split(), seq_length=8, seed=5, num_workers=2)
    threaded.prefetch(range(4, 9))
    threaded.prefetch(range(6, 12))
    for start in (6, 4, 40):
        expected = [as_lists(sample) for sample in plain.samples(range(start, start + 5))]
        assert [as_lists(sample) for sample in threaded.samples(range(start, start + 5))] == expected
    threaded.close()


@pytest.mark.parametrize(("token", "shown"), [(600, "600"), (-3, "-3")])
def test_a_token_beyond_the_vocabulary_is_refused(token: int, shown: str):
    stream = PretrainStream(split_of(share_of([5, token, 6, 7])), seq_length=3, seed=0, vocab_size=600)
    with pytest.raises(
        DataError, match=f"in-memory.bin contains token id {shown}, the model has vocab_size=600"
    ):
        stream.sample(0)


def test_a_fingerprint_names_all_that_decides_the_samples():
    prints = {
        PretrainStream(split, seq_length=length, seed=seed).fingerprint
        for split, length, seed in [
            (counting_split(), 8, 1),
            (counting_split(), 8, 2),
            (counting_split(), 9, 1),
            (counting_split(13), 8, 1),
        ]
    }
    assert len(prints) == 4
    assert PretrainStream(counting_split(), seq_length=8, seed=1).fingerprint in prints


def test_a_cursor_counts_up():
    cursor = SampleCursor(seed=0)
    assert cursor.take(3).indices == (0, 1, 2)
    assert cursor.peek(2) == cursor.peek(2) == cursor.take(2)
    assert cursor.take(1).indices == (5,) and cursor.consumed_samples == 6


@given(
    seed=st.integers(0, 9),
    within=st.integers(1, 30),
    steps=st.lists(st.booleans(), min_size=1, max_size=12),
    batch=st.integers(1, 5),
)
def test_what_is_put_back_comes_once_more_and_nothing_is_lost(
    seed: int, within: int, steps: list[bool], batch: int
):
    cursor = SampleCursor(seed=seed)
    put_back: list[int] = []
    drawn: list[tuple[int, bool]] = []
    for spiked in steps:
        draw = cursor.take(batch)
        drawn += zip(draw.indices, draw.is_retry, strict=True)
        if spiked:
            cursor.requeue(draw.indices, within=within)
            put_back += draw.indices
    # no sample waits longer than its bound and those that are due before it
    draw = cursor.take(within + len(put_back))
    drawn += zip(draw.indices, draw.is_retry, strict=True)
    fresh = [index for index, is_retry in drawn if not is_retry]
    assert fresh == list(range(len(fresh)))
    assert sorted(index for index, is_retry in drawn if is_retry) == sorted(put_back)


@given(
    seed=st.integers(0, 9),
    steps=st.lists(st.booleans(), min_size=2, max_size=12),
    stop=st.integers(0, 12),
)
def test_a_resumed_cursor_goes_on_as_if_never_stopped(seed: int, steps: list[bool], stop: int):
    def run(stop_at: int | None) -> list[object]:
        cursor = SampleCursor(seed=seed, fingerprint="data")
        seen: list[object] = []
        for step, spiked in enumerate(steps):
            if step == stop_at:
                state = json.loads(json.dumps(cursor.state_dict()))
                cursor = SampleCursor(seed=seed, fingerprint="data")
                cursor.load_state_dict(state)
            draw = cursor.take(4)
            seen.append(draw)
            if spiked:
                cursor.requeue(draw.indices, within=9)
        return [*seen, cursor.state_dict()]

    assert run(stop_at=stop) == run(stop_at=None)


def test_retries_are_scattered():
    cursor = SampleCursor(seed=1)
    cursor.requeue(cursor.take(20).indices, within=1000)
    places = [place for place, is_retry in enumerate(cursor.take(1020).is_retry) if is_retry]
    assert len(places) == 20 and max(places) - min(places) > 500


def test_a_cursor_of_other_data_is_refused():
    state = SampleCursor(seed=0, fingerprint="before").state_dict()
    with pytest.raises(
        DataError, match=r"fingerprint before, now after\); keep data_path, split, seq_length"
    ):
        SampleCursor(seed=0, fingerprint="after").load_state_dict(state)
