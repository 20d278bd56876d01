"""Conversations for supervised fine-tuning: tokenised once, packed densely, in an order that can be resumed at any step.

Legend: T token slots of a microbatch.

An epoch is a pure function of (conversations, seed, epoch): conversations are shuffled, and in that order packed by
best fit. The state of a run is the epoch and the number of its microbatches that were drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ring.data.batch.bins import best_fit
from megatron_ring.data.batch.microbatch import Microbatch, pack_microbatch
from megatron_ring.data.corpus.documents import Record, read_records
from megatron_ring.data.json_text import count_in, parse_json
from megatron_ring.data.processes import map_in_processes, open_tokenizer
from megatron_ring.data.shuffle import Shuffle
from megatron_ring.data.text.chat import Sample, render_samples
from megatron_ring.data.text.messages import Conversation, read_conversation
from megatron_ring.data.text.tokenizer import Tokenizer, TokenizerType
from megatron_ring.errors import DataError

MAX_OPEN = 64
"""Microbatches that are open at the same time while an epoch is packed."""

_RECORDS_PER_TASK = 512


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Tokenised conversations, end to end. Tokens after the last learned answer are cut off, since they carry no loss.

    If a chat template rewrites earlier turns, a conversation is stored once for each of its answers (see
    :func:`~megatron_ring.data.text.chat.render_samples`), and each of these counts as one conversation.

    Example, two conversations ``[5 6 7 1]`` and ``[5 8 1]`` whose answers are ``7 1`` and ``8 1``::

        tokens   [5, 6, 7, 1, 5, 8, 1]
        learned  [0, 0, 1, 1, 0, 1, 1]
        starts   [0, 4, 7]
    """

    tokens: np.ndarray
    """``int32``."""
    learned: np.ndarray
    """``bool``: the token belongs to an answer and carries loss."""
    starts: np.ndarray
    """``int64``: offset of each conversation, and the end of the last one."""
    num_too_long: int
    """Conversations left out because they are longer than ``longest``."""
    num_split: int = 0
    """Conversations of the files that are stored once for each of their answers."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def slots(self) -> np.ndarray:
        """Slots of each conversation: one fewer than its tokens, since the last token is only a label."""
        return np.diff(self.starts) - 1

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal conversations in equal order."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.tokens, self.learned, self.starts):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def prompt(self, index: int) -> list[int]:
        """Token ids up to the first answer."""
        start, end = self.starts[index : index + 2]
        first = start + int(np.argmax(self.learned[start:end]))
        return self.tokens[start:first].tolist()


def load_conversations(
    paths: Sequence[str | Path],
    *,
    tokenizer_type: TokenizerType,
    tokenizer_model: str,
    longest: int,
    workers: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Conversations:
    """Read and tokenise chat JSONL: ``{"messages": [{"role": "user", "content": "..."}, ...]}`` per line.

    :mod:`megatron_ring.data.text.messages` lists the other keys that are read.

    Args:
        paths: JSONL files or folders of them.
        tokenizer_type: together with tokenizer_model, the tokenizer; its chat template is applied.
        tokenizer_model: file or folder of the tokenizer.
        longest: a conversation with more tokens is left out and counted.
        workers: processes that tokenise; 0 uses this process. The result does not depend on it.
        chat_template_kwargs: variables for the chat template; those of a line take precedence.

    Raises:
        DataError: a file cannot be read, a line is not a conversation with an answer (the message names file and line),
            or no conversation is left.
    """
    read = _Reader(
        tokenizer_type=tokenizer_type, tokenizer_model=tokenizer_model, names=dict(chat_template_kwargs or {})
    )
    parts = list(map_in_processes(read, _tasks(paths), workers))
    lengths = np.concatenate([part[2] for part in parts]) if parts else np.zeros(0, np.int64)
    if not len(lengths):
        raise DataError(
            f"{_names(paths)}: contains no conversations; write one JSON object with messages per line"
        )
    keep = lengths <= longest
    if not keep.any():
        raise DataError(
            f"{_names(paths)}: all {len(lengths)} conversations are longer than seq_length={longest} tokens "
            f"(the shortest has {lengths.min()}); raise --seq-length"
        )
    wanted = np.repeat(keep, lengths)
    return Conversations(
        tokens=np.concatenate([part[0] for part in parts])[wanted],
        learned=np.concatenate([part[1] for part in parts])[wanted],
        starts=np.concatenate([[0], np.cumsum(lengths[keep])]),
        num_too_long=int((~keep).sum()),
        num_split=sum(part[3] for part in parts),
    )


class SftStream:
    """An endless sequence of microbatches of packed conversations, epoch after epoch.

    Example: ``SftStream(conversations, capacity=4096, seed=1).take(8)``: conversations of the first 8 microbatches.
    """

    def __init__(self, conversations: Conversations, *, capacity: int, seed: int) -> None:
        """
        Args:
            conversations: each takes at most ``capacity`` slots.
            capacity: T, slots of a microbatch.
            seed: of the shuffles; the same on every rank.
        """
        self.conversations = conversations
        self.capacity = capacity
        self._seed = seed
        self._slots: list[int] = conversations.slots.tolist()
        self._epoch_plan = lru_cache(maxsize=2)(self._plan)
        self.fingerprint = f"{conversations.fingerprint}-{capacity}-{seed}"
        """Equal fingerprints give equal microbatches."""
        self.epoch = 0
        """Epoch of the next microbatch, from 0."""
        self._drawn = 0

    def microbatches_in(self, epochs: float) -> int:
        """Number of microbatches in ``epochs`` epochs; the fraction of the last one is rounded."""
        whole = math.floor(epochs)
        count = sum(len(self._plan(epoch)) for epoch in range(whole))
        part = epochs - whole
        return count + (round(part * len(self._plan(whole))) if part else 0)

    def take(self, count: int) -> list[tuple[int, ...]]:
        """Indices of the conversations of each of the next ``count`` microbatches, across epochs if needed."""
        taken: list[tuple[int, ...]] = []
        while len(taken) < count:
            plan = self._epoch_plan(self.epoch)
            fresh = plan[self._drawn : self._drawn + count - len(taken)]
            taken += fresh
            self._drawn += len(fresh)
            if self._drawn == len(plan):
                self.epoch, self._drawn = self.epoch + 1, 0
        return taken

    def first(self, count: int) -> list[tuple[int, ...]]:
        """The first microbatches of epoch 0, at most ``count``: the validation set, the same at every call."""
        return self._epoch_plan(0)[:count]

    def num_tokens(self, groups: Sequence[Sequence[int]]) -> int:
        """Slots that hold tokens in these microbatches."""
        return sum(self._slots[index] for group in groups for index in group)

    def microbatch(self, group: Sequence[int]) -> Microbatch:
        """The conversations of ``group``, each its own attention segment; an empty group gives padding only.

        They are sorted by length, so that attention can batch segments of equal length.
        """
        c = self.conversations
        group = sorted(group, key=lambda index: (self._slots[index], index))
        spans = [(int(c.starts[index]), int(c.starts[index + 1])) for index in group]
        if not spans:
            return pack_microbatch([], self.capacity)
        tokens = np.concatenate([c.tokens[start : end - 1] for start, end in spans])
        labels = np.concatenate([c.tokens[start + 1 : end] for start, end in spans])
        learned = np.concatenate([c.learned[start + 1 : end] for start, end in spans])
        lengths = [end - start - 1 for start, end in spans]
        # arrays pass for sequences of numbers
        columns: Any = (tokens, labels, learned)
        return pack_microbatch([columns], self.capacity, segment_lengths=[lengths])

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, as numbers and strings."""
        return {"epoch": self.epoch, "drawn": self._drawn, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a :meth:`state_dict`.

        Raises:
            DataError: the state belongs to other conversations, another packing or another seed.
        """
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"the checkpoint was reading other conversations (fingerprint {state['fingerprint']}, now "
                f"{self.fingerprint}); keep sft_data, tokenizer, seq_length, micro_batch_size and seed, or start "
                "from its weights alone with --pretrained-checkpoint and another --save"
            )
        self.epoch, self._drawn = count_in(state, "epoch"), count_in(state, "drawn")

    def _plan(self, epoch: int) -> list[tuple[int, ...]]:
        count = len(self._slots)
        order = Shuffle(count, self._seed, "sft", epoch).many(np.arange(count)).tolist()
        return [tuple(group) for group in best_fit(self._slots, self.capacity, order, MAX_OPEN)]


_Part = tuple[np.ndarray, np.ndarray, np.ndarray, int]
"""Tokens, their learned flags and the lengths of some conversations; how many of these gave several samples."""


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Tokenises records. It is pickled to worker processes; each of them opens the tokenizer once."""

    tokenizer_type: TokenizerType
    tokenizer_model: str
    names: dict[str, Any]

    def __call__(self, records: Sequence[Record]) -> _Part:
        tokenizer = open_tokenizer(self.tokenizer_type, self.tokenizer_model)
        tokenizer.template.use(self.names)
        ids: list[int] = []
        learned: list[bool] = []
        lengths: list[int] = []
        split = 0
        for record in records:
            samples = _samples(record, tokenizer)
            split += len(samples) > 1
            for own_ids, own_learned in samples:
                ids += own_ids
                learned += own_learned
                lengths.append(len(own_ids))
        return np.array(ids, np.int32), np.array(learned, bool), np.array(lengths, np.int64), split


def _tasks(paths: Sequence[str | Path]) -> Iterator[list[Record]]:
    task: list[Record] = []
    for record in read_records(paths):
        task.append(record)
        if len(task) == _RECORDS_PER_TASK:
            yield task
            task = []
    if task:
        yield task


def _samples(record: Record, tokenizer: Tokenizer) -> list[Sample]:
    """The samples of a line, each cut after its last learned token."""
    conversation = read_line(record)
    try:
        samples = render_samples(tokenizer, conversation)
    except DataError as error:
        raise DataError(f"{record.origin}: {error}") from None
    samples = [(ids, learned) for ids, learned in samples if True in learned]
    if not samples:
        why = "every answer has weight 0" if conversation.unlearned else "no message with role assistant"
        raise DataError(f"{record.origin}: {why}, so nothing carries loss; add an answer or remove the line")
    ends = [len(learned) - learned[::-1].index(True) for _, learned in samples]
    return [(ids[:end], learned[:end]) for (ids, learned), end in zip(samples, ends, strict=True)]


def read_line(record: Record) -> Conversation:
    """The conversation of one JSONL line.

    Raises:
        DataError: not JSON, no list of messages with role and content, or a key that matters and is not supported.
    """
    if not record.is_json:
        raise DataError(f"{record.origin} is not JSONL; name a .jsonl file of conversations")
    fields = parse_json(record.raw, record.origin, unique=True)
    if not isinstance(fields, dict):
        raise DataError(
            f"{record.origin} is a JSON {type(fields).__name__}, not an object; write one conversation per line, as "
            "datasets' to_json(lines=True) does"
        )
    return read_conversation(fields, record.origin)


def _names(paths: Sequence[str | Path]) -> str:
    return ", ".join(map(str, paths))
