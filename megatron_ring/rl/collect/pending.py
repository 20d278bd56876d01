"""Which responses a step still waits for: groups from the first draw of a prompt to its last reward.

Pure: no tensors, no collectives. Invariants (one test each): a group leaves whole, once, with every member
that was not dropped; members leave in the order of their sample numbers, groups in the order of their
prompts; what is unfinished is asked for again with its prefix; nothing older than the retention bound stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.types import Response, Rollout


@dataclass(kw_only=True, slots=True)
class OpenGroup:
    """A prompt whose responses are not all there yet.

    Example: 4 samples, of which 0 has its reward, 2 was interrupted and 1 and 3 have not begun:
    ``OpenGroup(prompt=..., waiting={1, 2, 3}, finished={0: rollout}, unfinished={2: response})``.
    """

    prompt: Prompt
    waiting: set[int]
    finished: dict[int, Rollout] = field(default_factory=dict[int, Rollout])
    unfinished: dict[int, Response] = field(default_factory=dict[int, Response])


class PendingGroups:
    """The open groups of one data-parallel rank, in the order of their prompts."""

    def __init__(self, group_size: int):
        self.group_size = group_size
        self.open: dict[int, OpenGroup] = {}

    @property
    def num_tokens(self) -> int:
        """Response tokens that open groups hold, finished or interrupted."""
        return sum(
            response.length
            for group in self.open.values()
            for response in (*(r.response for r in group.finished.values()), *group.unfinished.values())
        )

    def draw(self, prompts: Iterable[Prompt]) -> None:
        """Open a group for each prompt."""
        for prompt in prompts:
            self.open[prompt.uid] = OpenGroup(prompt=prompt, waiting=set(range(self.group_size)))

    def wanted(self) -> list[tuple[Prompt, int, Response | None]]:
        """(prompt, sample, prefix to continue) of every response that is missing, oldest prompt first."""
        return [
            (group.prompt, sample, group.unfinished.get(sample))
            for group in self.open.values()
            for sample in sorted(group.waiting)
        ]

    def finish(self, rollout: Rollout) -> None:
        """A response has ended and has its reward."""
        group, sample = self.open[rollout.prompt.uid], rollout.response.sample
        group.waiting.remove(sample)
        group.unfinished.pop(sample, None)
        group.finished[sample] = rollout

    def interrupt(self, response: Response) -> None:
        """Generation stopped inside a response: keep its prefix."""
        if response.length:
            self.open[response.prompt_uid].unfinished[response.sample] = response

    def drop_stale(self, oldest_version: int) -> list[Response]:
        """Drop responses with a token from before ``oldest_version``, finished or not; returns them."""

        def is_stale(response: Response) -> bool:
            return bool((response.versions_R < oldest_version).any())

        dropped: list[Response] = []
        for group in self.open.values():
            for sample in [s for s, r in group.unfinished.items() if is_stale(r)]:
                dropped.append(group.unfinished.pop(sample))
                group.waiting.remove(sample)
            for sample in [s for s, r in group.finished.items() if is_stale(r.response)]:
                dropped.append(group.finished.pop(sample).response)
        return dropped

    def take_complete(self) -> tuple[list[list[Rollout]], list[Rollout]]:
        """Remove and return the complete groups, each in the order of its samples, and the members that were
        left alone.

        If a group has lost all but one member, that member has nothing to be compared with and is returned
        separately; with ``group_size`` 1 (with a critic) every group has one member.
        """
        done = [uid for uid, group in self.open.items() if not group.waiting]
        members = [self.open.pop(uid).finished for uid in done]
        groups = [[of_group[s] for s in sorted(of_group)] for of_group in members]
        least = min(self.group_size, 2)
        alone = [rollout for group in groups if len(group) < least for rollout in group]
        return [group for group in groups if len(group) >= least], alone

    def contents(self) -> tuple[list[Prompt], list[Rollout], list[Response]]:
        """Prompts, finished members and prefixes of the open groups: what a checkpoint has to hold."""
        groups = self.open.values()
        return (
            [group.prompt for group in groups],
            [rollout for group in groups for rollout in group.finished.values()],
            [response for group in groups for response in group.unfinished.values()],
        )

    def restore(
        self,
        prompts: Sequence[Prompt],
        waiting: Sequence[Sequence[int]],
        finished: Iterable[Rollout],
        unfinished: Iterable[Response],
    ) -> None:
        """Undo :meth:`contents`; ``waiting`` lists each prompt's missing samples."""
        self.open = {
            prompt.uid: OpenGroup(prompt=prompt, waiting=set(samples))
            for prompt, samples in zip(prompts, waiting, strict=True)
        }
        for rollout in finished:
            self.open[rollout.prompt.uid].finished[rollout.response.sample] = rollout
        for response in unfinished:
            self.open[response.prompt_uid].unfinished[response.sample] = response


def is_informative(group: Sequence[Rollout]) -> bool:
    """False when all rewards of the group are equal: no response is better than another."""
    return len({rollout.reward.score for rollout in group}) > 1
