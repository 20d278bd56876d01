"""The part of a run's rollouts that outlives a step: one object, saved and restored as a whole.

A checkpoint keeps the numbers that all ranks share in its JSON, and what each data-parallel rank holds in files of
that rank. A resume at another number of ranks reads all files and takes its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from megatron_ring.data.json_text import count_in, counts_in
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import CheckpointError
from megatron_ring.rl.collect.pending import PendingGroups
from megatron_ring.rl.rollout_io import (
    note_of,
    prompt_from_json,
    prompt_to_json,
    responses_from_bytes,
    responses_to_bytes,
    rollouts_from_bytes,
    rollouts_to_bytes,
)
from megatron_ring.rl.types import Rollout
from megatron_ring.runtime.topology import Topology


class Prompts(Protocol):
    """Where prompts come from: :class:`megatron_ring.data.prompts.stream.PromptStream` is one."""

    def next(self, count: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RolloutState:
    """One data-parallel rank's share of the rollouts that wait for a later step.

    ``pending`` are groups that lack a member; ``carried`` are responses that the last budget left;
    ``steps_without_signal`` counts steps in a row whose complete groups were all uninformative; ``tokens_left`` is what
    the last step's ledger carried over, None in a run's first step.
    """

    def __init__(self, prompts: Prompts, group_size: int):
        self.prompts = prompts
        self.pending = PendingGroups(group_size)
        self.carried: list[Rollout] = []
        self.steps_without_signal = 0
        self.tokens_left: int | None = None

    @property
    def carried_tokens(self) -> int:
        """This rank's response tokens that the last step's budget left."""
        return sum(rollout.unused for rollout in self.carried)

    def state_dict(self, dp_size: int) -> dict[str, Any]:
        """What all ranks share; JSON-able."""
        return {
            "prompts": self.prompts.state_dict(),
            "steps_without_signal": self.steps_without_signal,
            "tokens_left": self.tokens_left,
            "ranks": dp_size,
        }

    def files(self, dp_rank: int) -> dict[str, bytes]:
        """What only this rank has, as files of a checkpoint."""
        prompts, finished, unfinished = self.pending.contents()
        groups = [
            {"prompt": prompt_to_json(group.prompt), "waiting": sorted(group.waiting)}
            for group in self.pending.open.values()
        ]
        by_uid = {prompt.uid: prompt for prompt in prompts}
        return {
            _file("finished", dp_rank): rollouts_to_bytes(finished, note=groups),
            _file("unfinished", dp_rank): responses_to_bytes([(by_uid[r.prompt_uid], r) for r in unfinished]),
            _file("carried", dp_rank): rollouts_to_bytes(self.carried),
        }

    def load_state_dict(
        self, state: dict[str, Any], read: Callable[[str], bytes], topology: Topology
    ) -> None:
        """Take this rank's share of what all ranks had; ``read`` returns a file of :meth:`files` by its name.

        Raises:
            CheckpointError: a file is missing or damaged.
            KeyError, TypeError, ValueError: a value is missing or invalid.
        """
        self.prompts.load_state_dict(state["prompts"])
        self.steps_without_signal = count_in(state, "steps_without_signal")
        self.tokens_left = None if state["tokens_left"] is None else count_in(state, "tokens_left")
        groups, finished, unfinished, self.carried = [], [], [], []
        for rank in range(count_in(state, "ranks")):
            data = {name: read(_file(name, rank)) for name in ("finished", "unfinished", "carried")}
            with _of_file("finished", rank):
                groups += [
                    (prompt_from_json(group["prompt"]), counts_in(group, "waiting"))
                    for group in note_of(data["finished"])
                ]
                finished += rollouts_from_bytes(data["finished"])
            with _of_file("unfinished", rank):
                unfinished += responses_from_bytes(data["unfinished"])
            with _of_file("carried", rank):
                rollouts = _carried(data["carried"])
            self.carried += [rollout for rollout in rollouts if topology.owns(rollout.prompt.uid)]
        own = sorted(
            (group for group in groups if topology.owns(group[0].uid)), key=lambda group: group[0].uid
        )
        self.pending.restore(
            [prompt for prompt, _ in own],
            [waiting for _, waiting in own],
            [rollout for rollout in finished if topology.owns(rollout.prompt.uid)],
            [response for prompt, response in unfinished if topology.owns(prompt.uid)],
        )

    def waiting_prompts(self) -> list[Prompt]:
        """Prompts that were drawn and are not trained on yet."""
        begun = [group.prompt for group in self.pending.open.values()]
        return [*begun, *(rollout.prompt for rollout in self.carried)]

    def require_fit(self, microbatch_capacity: int, max_response_length: int) -> None:
        """Raise CheckpointError if a saved response, at its present or its largest possible length, exceeds a
        microbatch."""
        slots = [rollout.num_tokens - 1 for rollout in self.carried]
        for group in self.pending.open.values():
            lengths = [r.response.length for r in group.finished.values()]
            lengths += [max_response_length] * bool(group.waiting)
            slots.append(len(group.prompt.tokens) + max(lengths, default=1) - 1)
        if max(slots, default=0) > microbatch_capacity:
            raise CheckpointError(
                f"microbatch_capacity={microbatch_capacity} is less than the {max(slots)} tokens of a prompt and response "
                f"that the checkpoint continues; set --microbatch-capacity {max(slots)} or more"
            )

    def require_logprobs(self, setting: str) -> None:
        """Raise CheckpointError where ``setting`` needs log p that an earlier run's engine did not know."""
        waiting = [rollout.response for rollout in self.carried]
        for group in self.pending.open.values():
            waiting += [rollout.response for rollout in group.finished.values()]
            waiting += group.unfinished.values()
        if any(np.isnan(response.logprobs_R).any() for response in waiting):
            raise CheckpointError(
                f"{setting} needs log p of every token, and the checkpoint goes on with responses of a rollout engine that "
                "does not give it; drop the setting, or start from the weights alone with --pretrained-checkpoint"
            )


def _carried(data: bytes) -> list[Rollout]:
    rollouts, places = rollouts_from_bytes(data), note_of(data)
    if places is None:
        return rollouts
    # an older checkpoint's [start, carried] of each
    pairs = [counts_in({"carried": place}, "carried") for place in places]
    return [
        replace(rollout, start=start, carried=carried)
        for rollout, (start, carried) in zip(rollouts, pairs, strict=True)
    ]


@contextmanager
def _of_file(name: str, dp_rank: int) -> Iterator[None]:
    """Name the file that a CheckpointError of this block is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{_file(name, dp_rank)}: {error}") from None


def _file(name: str, dp_rank: int) -> str:
    return f"rollouts-{name}-{dp_rank}.safetensors"
