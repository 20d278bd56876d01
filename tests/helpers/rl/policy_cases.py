"""Rollouts to learn from, and the policy's loss as plain loops over single responses in double precision.

Written from the papers' formulas and from nothing in the package but its settings and types. Legend: R
response tokens of a pick, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ring.config.rl import ObjectiveConfig, clip_bounds, mismatch_bounds
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.batch.microbatch import RLMicrobatch, build_microbatch, with_column
from megatron_ring.rl.types import Pick, Response, RewardResult, Rollout

VOCAB = 250
GROUP = 3
LENGTHS = ((5, 11), (5, 4), (5, 9), (3, 1), (3, 14), (3, 6), (9, 7), (9, 13), (9, 5), (2, 8), (2, 8), (2, 3))
"""(prompt, response) tokens; three responses to each prompt."""
PICKS = [Pick(i, 0, r) for i, (_, r) in enumerate(LENGTHS)]
PICKS[4] = Pick(4, 0, 9)
"""Cut at a token, as the budget does."""
PICKS[7] = Pick(7, 5, 13)
"""The rest of a response whose start was trained on before."""
NUM_TOKENS = sum(pick.num_tokens for pick in PICKS)


def rollouts(seed: int = 0, spread: float = 0.3) -> list[Rollout]:
    """Random responses with random rewards and advantages; log probabilities are of about a uniform policy."""
    random = np.random.default_rng(seed)
    out = []
    for index, (prompt_length, length) in enumerate(LENGTHS):
        uid, sample = divmod(index, GROUP)
        tokens = tuple(np.random.default_rng(100 + uid).integers(0, VOCAB, prompt_length).tolist())
        response = Response(
            prompt_uid=uid,
            sample=sample,
            tokens_R=random.integers(0, VOCAB, length).astype(np.int32),
            logprobs_R=(-math.log(VOCAB) + spread * random.standard_normal(length)).astype(np.float32),
            versions_R=np.zeros(length, dtype=np.int32),
            stop="eos",
        )
        score = float(random.integers(0, 2))
        out.append(
            Rollout(
                prompt=Prompt(uid=uid, domain="math", text="", tokens=tokens, reference={}),
                response=response,
                reward=RewardResult(score=score, status="correct" if score else "wrong"),
                advantages_R=random.standard_normal(length).astype(np.float32),
            )
        )
    return out


PACKINGS = {
    "one": [list(range(12))],
    "two": [[0, 3, 4, 5, 9, 11], [1, 2, 6, 7, 8, 10]],
    "four": [[11, 1, 0], [2, 3, 4], [6, 5, 7], [9, 8, 10]],
    "eight": [[0, 1], [2, 3], [4, 5, 6], [7], [8, 9], [], [10], [11]],
    "holes": [[7, 8], [], [6, 9, 10, 11, 5, 4], [0, 1, 2, 3]],
}
"""Which picks share a microbatch."""


def grid(
    samples: Sequence[Rollout],
    packing: str,
    num_slots: int = 0,
    picks: Sequence[Pick] = tuple(PICKS),
    **options,
) -> list[RLMicrobatch]:
    """The picks in one of ``PACKINGS``."""
    groups = [[picks[i] for i in row] for row in PACKINGS[packing]]
    slots = num_slots or {"one": 180, "two": 96, "four": 60, "eight": 60, "holes": 96}[packing]
    return [build_microbatch(samples, group, slots, **options) for group in groups]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """log p of the response tokens under other policies, by response. Example: ``Scored(old=[...], ref=[...])``."""

    old: list[Tensor]
    ref: list[Tensor]


def off_policy(
    own: Sequence[Tensor], samples: Sequence[Rollout], seed: int = 1
) -> tuple[Scored, list[Rollout]]:
    """Old and reference policies near ``own`` (log p per response), and rollouts sampled by a third; far enough
    apart for every clip and bound to bite somewhere.
    """
    generator = torch.Generator().manual_seed(seed)

    def near(logp_R: Tensor, spread: float) -> Tensor:
        return (logp_R.double() + spread * torch.randn(len(logp_R), generator=generator)).float()

    old = [near(logp_R, 0.4) for logp_R in own]
    ref = [near(logp_R, 0.5) for logp_R in own]
    moved = [
        replace(r, response=replace(r.response, logprobs_R=near(logp_R, 0.8).numpy()))
        for r, logp_R in zip(samples, old, strict=True)
    ]
    return Scored(old=old, ref=ref), moved


def with_columns(
    microbatches: Sequence[RLMicrobatch], columns: dict[str, Sequence[Tensor]]
) -> list[RLMicrobatch]:
    """Several columns at once, each one [T] per microbatch."""
    out = list(microbatches)
    for name, rows in columns.items():
        out = with_column(out, name, rows)
    return out


def columns_of(
    per_response: Sequence[Tensor], samples: Sequence[Rollout], packing: str, slots: Sequence[int]
):
    """One [T] column per microbatch from values per response token."""
    out = []
    for row, num_slots in zip(PACKINGS[packing], slots, strict=True):
        column_T, place = torch.zeros(num_slots), 0
        for index in row:
            pick, prompt = PICKS[index], len(samples[index].prompt.tokens)
            first = place + prompt - 1
            column_T[first : first + pick.stop] = per_response[index][: pick.stop]
            place += prompt + pick.stop - 1
        out.append(column_T)
    return out


def plain_loss(
    logits: Sequence[Tensor],
    samples: Sequence[Rollout],
    scored: Scored,
    c: ObjectiveConfig,
    *,
    temperature: float,
    token_budget: int,
    max_response_length: int,
) -> Tensor:
    """The loss of all ``PICKS``. ``logits[i]`` [R, V] predict the response tokens of rollout i, fp64."""
    lower, upper = clip_bounds(c)
    lowest, highest = mismatch_bounds(c)
    total = torch.zeros((), dtype=torch.float64)
    for pick in PICKS:
        rollout, tokens = samples[pick.index], range(pick.start, pick.stop)
        logp_RV = (logits[pick.index] / temperature).log_softmax(-1)
        taken = [logp_RV[t, int(rollout.response.tokens_R[t])] for t in tokens]
        rolled = [float(rollout.response.logprobs_R[t]) for t in tokens]
        old = {
            "recompute": [float(scored.old[pick.index][t]) for t in tokens],
            "rollout": rolled,
            "current": [float(logp.detach()) for logp in taken],
        }[c.old_logprobs]
        ratios = [(logp - o).exp() for logp, o in zip(taken, old, strict=True)]
        if c.objective == "gspo":
            mean = sum(logp - o for logp, o in zip(taken, old, strict=True)) / len(taken)
            ratios = [mean.exp()] * len(taken)
        of_response = torch.zeros((), dtype=torch.float64)
        for t, logp, o, roll, ratio in zip(tokens, taken, old, rolled, ratios, strict=True):
            A = float(rollout.advantages_R[t])
            bounded = ratio.clamp(lower, upper)
            if c.objective == "cispo":
                gain = bounded.detach() * A * logp
            else:
                gain = torch.minimum(ratio * A, bounded * A)
                if c.eps_clip_c > 0 and A < 0:
                    gain = torch.maximum(gain, torch.tensor(c.eps_clip_c * A, dtype=torch.float64))
            k = math.exp(o - roll)
            inside = lowest <= k <= highest
            weight = {
                "none": 1.0,
                "icepop": k if inside else 0.0,
                "tis": min(k, highest),
                "mis": k if inside else 0.0,
                "mask": float(inside),
            }[c.mismatch_correction]
            d = logp - float(scored.ref[pick.index][t])
            kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[c.kl_loss_type]
            entropy = -(logp_RV[t].exp() * logp_RV[t]).sum()
            of_response = of_response - weight * gain + c.kl_loss_coef * kl - c.entropy_coef * entropy
        total = total + (of_response / len(taken) if c.objective in ("grpo", "gspo") else of_response)
    divisor = {
        "c3po": token_budget,
        "grpo": len(PICKS),
        "gspo": len(PICKS),
        "dapo": NUM_TOKENS,
        "cispo": NUM_TOKENS,
        "dr_grpo": len(PICKS) * max_response_length,
    }[c.objective]
    return total / divisor
