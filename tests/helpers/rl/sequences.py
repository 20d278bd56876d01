"""Requests and checks shared by the tests of generation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ring.data.batch.microbatch import pack_microbatch
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.rollout.protocol import Request, SamplingParams
from megatron_ring.rl.types import Response

PROMPT_LENGTHS = (5, 1, 17, 9, 17, 30, 2, 11)


def prompt(uid: int, length: int, vocab_size: int = 250) -> Prompt:
    generator = np.random.default_rng(uid)
    tokens = tuple(generator.integers(0, vocab_size, length).tolist())
    return Prompt(uid=uid, domain="test", text="", tokens=tokens, reference={})


def requests(lengths: Sequence[int] = PROMPT_LENGTHS, samples: int = 1) -> list[Request]:
    """One prompt for each length, asked ``samples`` times."""
    prompts = [prompt(uid, length) for uid, length in enumerate(lengths)]
    return [Request(prompt=p, sample=sample) for p in prompts for sample in range(samples)]


def sampling(length: int = 12, **settings) -> SamplingParams:
    return SamplingParams(max_response_length=length, **{"seed": 3, **settings})


def by_key(responses: Sequence[Response]) -> dict[tuple[int, int], Response]:
    found = {response.key: response for response in responses}
    assert len(found) == len(responses)
    return found


def scored(engine, request: Request, response: Response, temperature: float = 1.0) -> tuple:
    """The trainer's log p of the response's tokens, and its most likely tokens: ``(logp_R, argmax_R)``."""
    tokens = [*request.prompt.tokens, *response.tokens_R.tolist()]
    slots = -(-(len(tokens) - 1) // 8) * 8
    row = pack_microbatch([(tokens[:-1], tokens[1:], [1.0] * (len(tokens) - 1))], slots)
    first, last = len(request.prompt.tokens) - 1, len(tokens) - 1
    ((logp_T, _),) = engine.score([row], temperature)
    size = engine.config.model.vocab_size
    (best_T,) = engine.forward(
        [row], lambda _, logits: (logits.main_TV.sum(), logits.main_TV[:, :size].argmax(-1))
    )
    return logp_T[first:last].numpy(), best_T[first:last].numpy()


def assert_same(ours: Response, theirs: Response, tolerance: float = 1e-5) -> None:
    assert ours.tokens_R.tolist() == theirs.tokens_R.tolist()
    assert ours.stop == theirs.stop
    np.testing.assert_allclose(ours.logprobs_R, theirs.logprobs_R, atol=tolerance, rtol=0)
