"""Packing loses nothing, and shifting never crosses a segment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.batch.microbatch import IGNORE, PADDING_SEGMENT, Microbatch, pack_microbatch

tokens = st.integers(1, 99)
triples = st.lists(tokens, min_size=1, max_size=9).flatmap(
    lambda row: st.tuples(
        st.just(row),
        st.lists(tokens, min_size=len(row), max_size=len(row)),
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(row), max_size=len(row)),
    )
)
batches = st.lists(triples, min_size=1, max_size=5)


def test_the_docstrings_example_holds():
    packed = pack_microbatch([([11, 12, 13], [12, 13, 0], [1, 1, 0]), ([21, 22], [22, 0], [1, 0])], 6)
    assert packed.tokens_T.tolist() == [11, 12, 13, 21, 22, 0]
    assert packed.labels_T.tolist() == [12, 13, IGNORE, 22, IGNORE, IGNORE]
    assert packed.loss_mask_T.tolist() == [1, 1, 0, 1, 0, 0]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1, 0]
    assert packed.valid_T.tolist() == [True] * 5 + [False]
    assert (packed.segment_lengths, packed.num_valid) == ((3, 2, 1), 5)
    assert packed.cu_seqlens.tolist() == [0, 3, 5, 6]


@given(batches, st.integers(0, 7))
def test_packing_keeps_every_token_in_order_and_marks_the_rest_as_padding(sequences, spare):
    used = sum(len(row) for row, _, _ in sequences)
    packed = pack_microbatch(sequences, used + spare, pad_id=0)
    assert packed.tokens_T.tolist() == [t for row, _, _ in sequences for t in row] + [0] * spare
    labels = [y if m else IGNORE for _, row, mask in sequences for y, m in zip(row, mask, strict=True)]
    assert packed.labels_T.tolist() == labels + [IGNORE] * spare
    assert packed.valid_T.sum() == packed.num_valid == used
    assert not packed.loss_mask_T[used:].any()
    lengths = [len(row) for row, _, _ in sequences] + ([spare] if spare else [])
    assert list(packed.segment_lengths) == lengths == packed.cu_seqlens.diff().tolist()
    assert packed.cu_seqlens[-1] == packed.num_slots == used + spare
    assert packed.positions_T.tolist() == [i for n in lengths for i in range(n)]
    assert packed.segment_of_T.tolist() == [s for s, n in enumerate(lengths) for _ in range(n)]


@given(batches, st.integers(0, 5 * PADDING_SEGMENT))
def test_padding_is_attended_in_short_segments(sequences, spare):
    used = sum(len(row) for row, _, _ in sequences)
    packed = pack_microbatch(sequences, used + spare)
    padding = packed.segment_lengths[len(sequences) :]
    assert sum(padding) == spare and packed.num_valid == used
    assert all(0 < length <= PADDING_SEGMENT for length in padding)


@given(batches, st.integers(0, 7), st.integers(1, 12))
def test_shifting_stays_inside_segments(sequences, spare, by):
    used = sum(len(row) for row, _, _ in sequences)
    packed = pack_microbatch(sequences, used + spare)
    expected: list[int] = []
    for start, end in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
        segment = packed.tokens_T[start:end].tolist()
        expected += segment[by:] + [-7] * min(by, len(segment))
    assert packed.shifted(packed.tokens_T, fill=-7, by=by).tolist() == expected


@given(batches)
def test_a_sequence_may_hold_several_segments(sequences):
    splits = [(len(row) // 2, len(row) - len(row) // 2) for row, _, _ in sequences]
    used = sum(len(row) for row, _, _ in sequences)
    packed = pack_microbatch(sequences, used, segment_lengths=splits)
    # a segment of no tokens is no segment
    assert list(packed.segment_lengths) == [n for split in splits for n in split if n]


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="3 tokens do not fit into a microbatch of 2 slots"):
        pack_microbatch([([1, 2, 3], [1, 2, 3], [1, 1, 1])], 2)


def test_moving_keeps_what_is_no_tensor():
    packed = pack_microbatch([([1, 2], [2, 3], [1, 1])], 3)
    moved = packed.to(torch.device("meta"))
    assert isinstance(moved, Microbatch) and moved.tokens_T.is_meta and moved.cu_seqlens.is_meta
    assert (moved.segment_lengths, moved.num_valid) == (packed.segment_lengths, packed.num_valid)
