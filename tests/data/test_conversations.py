"""Conversations: read, masked, packed and drawn in an order that can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data.batch.microbatch import IGNORE
from megatron_ring.data.conversations import (
    Conversations,
    SftStream,
    load_conversations,
)
from megatron_ring.errors import DataError


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def load(path: Path, tokenizer: Path, longest: int = 64, workers: int = 0) -> Conversations:
    return load_conversations(
        [path],
        tokenizer_type="sentencepiece",
        tokenizer_model=str(tokenizer),
        longest=longest,
        workers=workers,
    )


def made(lengths: list[int]) -> Conversations:
    """Conversations of these lengths; token j of conversation i is 100 * i + j, the first third is a question."""
    tokens = np.concatenate([100 * i + np.arange(n) for i, n in enumerate(lengths)])
    learned = np.concatenate([np.arange(n) >= max(n // 3, 1) for n in lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Conversations(tokens=tokens.astype(np.int32), learned=learned, starts=starts, num_too_long=0)


def test_only_answers_are_learned_and_what_follows_the_last_one_is_cut(
    sentencepiece, sentencepiece_file, tmp_path
):
    turns = chat("1+1?", "<think>easy</think>2")["messages"] + chat("+1?", "3")["messages"]
    path = write(tmp_path / "a.jsonl", {"messages": [*turns, {"role": "user", "content": "thanks"}]})
    found = load(path, sentencepiece_file)
    learned = [int(t) for t, wanted in zip(found.tokens, found.learned, strict=True) if wanted]
    eos = sentencepiece.eos_id
    assert learned == [*sentencepiece.encode("<think>easy</think>2"), eos, *sentencepiece.encode("3"), eos]
    assert found.tokens[-1] == eos and "thanks" not in sentencepiece.decode(found.tokens.tolist())
    assert sentencepiece.decode(found.prompt(0)) == "<role>HUMAN</role>1+1?<role>ASSISTANT</role>"


def test_a_conversation_longer_than_asked_for_is_left_out_and_counted(sentencepiece_file, tmp_path):
    path = write(tmp_path / "a.jsonl", chat("hi", "yes"), chat("hi", "never " * 100), chat("ho", "no"))
    found = load(path, sentencepiece_file)
    assert (len(found), found.num_too_long) == (2, 1)
    with pytest.raises(DataError, match=r"all 3 conversations are longer than seq_length=2 tokens"):
        load(path, sentencepiece_file, longest=2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "a.jsonl:2: no message with role assistant"),
        ("{", "a.jsonl:2 is not JSON"),
        ({"text": "hi"}, 'a.jsonl:2 has no list under "messages"'),
        ({"messages": [{"role": "user"}]}, "a.jsonl:2: message 0 must have a role and a content"),
        (
            {"messages": [{"role": "wizard", "content": ""}, *chat("a", "b")["messages"]]},
            "a.jsonl:2: .*wizard",
        ),
    ],
)
def test_a_line_that_teaches_nothing_is_named(sentencepiece_file, tmp_path, line, said):
    path = write(tmp_path / "a.jsonl", chat("hi", "yes"), line)
    with pytest.raises(DataError, match=said) as caught:
        load(path, sentencepiece_file)
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_one_that_is_no_jsonl(sentencepiece_file, tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl: contains no conversations"):
        load(write(tmp_path / "a.jsonl"), sentencepiece_file)
    with pytest.raises(DataError, match=r"a.txt is not JSONL"):
        load(write(tmp_path / "a.txt", "hello"), sentencepiece_file)


def test_workers_change_nothing(sentencepiece_file, tmp_path):
    path = write(tmp_path / "a.jsonl", *(chat(f"{i}+1?", f"{i + 1}") for i in range(1500)))
    assert load(path, sentencepiece_file, workers=2).fingerprint == load(path, sentencepiece_file).fingerprint


def test_a_microbatch_holds_each_conversation_apart():
    microbatch = SftStream(made([6, 3, 5]), capacity=14, seed=1).microbatch((0, 1, 2))
    assert microbatch.segment_lengths == (2, 4, 5, 3)
    assert microbatch.tokens_T.tolist() == [100, 101, 200, 201, 202, 203, 0, 1, 2, 3, 4, 0, 0, 0]
    ignored = IGNORE
    assert microbatch.labels_T.tolist() == [101, 102, 201, 202, 203, 204, ignored, 2, 3, 4, 5, *3 * [ignored]]
    assert microbatch.loss_mask_T.tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0]
    assert microbatch.positions_T.tolist()[:11] == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    padding = SftStream(made([6]), capacity=14, seed=1).microbatch(())
    assert (padding.num_valid, padding.segment_lengths) == (0, (14,))


def test_each_epoch_shows_every_conversation_once_in_another_order():
    stream = SftStream(made([4, 7, 9, 5, 3, 8] * 10), capacity=16, seed=3)
    count = stream.microbatches_in(1)
    first, second = stream.take(count), stream.take(stream.microbatches_in(2) - count)
    for groups in (first, second):
        assert sorted(index for group in groups for index in group) == list(range(60))
    assert first != second
    assert stream.epoch == 2
    assert stream.microbatches_in(1.5) == count + round(len(second) / 2)
    other = SftStream(made([4, 7, 9, 5, 3, 8] * 10), capacity=16, seed=4)
    assert other.take(count) != first


@pytest.mark.parametrize("before", [1, 7, 23])
def test_a_resumed_stream_goes_on_exactly(before: int):
    lengths = [4, 7, 9, 5, 3, 8] * 8
    straight = SftStream(made(lengths), capacity=16, seed=3)
    straight.take(before)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = SftStream(made(lengths), capacity=16, seed=3)
    resumed.load_state_dict(state)
    assert resumed.take(60) == straight.take(60)


@pytest.mark.parametrize("change", [{"capacity": 17}, {"seed": 4}, {"conversations": made([4, 7, 9, 6])}])
def test_a_state_of_other_conversations_is_refused(change: dict):
    state = SftStream(made([4, 7, 9, 5]), capacity=16, seed=3).state_dict()
    other = SftStream(**{"conversations": made([4, 7, 9, 5]), "capacity": 16, "seed": 3} | change)
    with pytest.raises(DataError, match="was reading other conversations"):
        other.load_state_dict(state)
