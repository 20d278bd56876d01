"""One rank calls an engine, such as a server's client, and passes its responses to its model-parallel group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_ring.errors import RingError, RolloutError
from megatron_ring.rl.rollout.protocol import Request, RolloutBudget, RolloutEngine, SamplingParams
from megatron_ring.rl.rollout_io import responses_from_bytes, responses_to_bytes
from megatron_ring.rl.types import Response
from megatron_ring.runtime.collectives import broadcast_bytes
from megatron_ring.runtime.session import Session


class Relay:
    """An engine that is called on the first rank of a model-parallel group, for all of that group.

    That rank yields responses as they come, so that verifiers work meanwhile; the others yield the same ones, in the
    same order, once all have come. An error of the engine is raised on all of them.
    """

    on_every_rank = True

    def __init__(self, engine: RolloutEngine, session: Session):
        self.engine, self.session = engine, session
        self.guarantees = engine.guarantees

    @property
    def version(self) -> int:
        return self.engine.version

    def publish(self, version: int) -> None:
        """Collective over the world: every rank has a part of the weights."""
        self.engine.publish(version)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, budget: RolloutBudget | None = None
    ) -> Iterator[Response]:
        """See :class:`RolloutEngine`. Collective over the model-parallel group, at the end."""
        if self.session.topology.groups.mp.rank() != 0:
            yield from self._hear()
            return
        heard: list[Response] = []
        error: RingError | None = None
        try:
            for response in self.engine.generate(requests, sampling, budget):
                heard.append(response)
                yield response
        except RingError as failed:
            error = failed
        self._tell(requests, heard, error)
        if error is not None:
            raise error

    def _tell(self, requests: Sequence[Request], heard: Sequence[Response], error: RingError | None) -> None:
        group, device = self.session.topology.groups.mp, self.session.device
        if group.size() == 1:
            return
        broadcast_bytes(str(error or "").encode(), 0, group, device)
        prompts = {request.prompt.uid: request.prompt for request in requests}
        if error is None:
            broadcast_bytes(responses_to_bytes([(prompts[r.prompt_uid], r) for r in heard]), 0, group, device)

    def _hear(self) -> list[Response]:
        group, device = self.session.topology.groups.mp, self.session.device
        if error := broadcast_bytes(b"", 0, group, device).decode():
            raise RolloutError(error)
        return [response for _, response in responses_from_bytes(broadcast_bytes(b"", 0, group, device))]

    def close(self) -> None:
        self.engine.close()
