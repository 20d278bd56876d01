"""Reinforcement learning: combinations of objective, advantages, sampling and model that make no sense."""

from collections.abc import Iterator

from megatron_ring.config.rl import mismatch_bounds
from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import flag

_OF_RESPONSES = ("grpo", "dr_grpo", "gspo")
"""Objectives that average over whole responses."""


def groups(config: RunConfig, world_size: int) -> Iterator[str]:
    """Advantages that have something to compare, or a critic. A user's estimator is not checked."""
    o, size = config.objective, config.rollout.group_size
    if o.advantage_estimator in ("group_norm", "group_mean", "rloo") and size < 2:
        yield (
            f"group_size={size} gives advantage_estimator={o.advantage_estimator} nothing to compare; try 16"
        )
    if o.advantage_estimator == "gae" and not o.critic:
        yield "advantage_estimator=gae needs a value model; add --critic"


def advantages(config: RunConfig, world_size: int) -> Iterator[str]:
    """Settings that the advantage estimator never reads, or that it contradicts."""
    o = config.objective
    if o.critic and o.advantage_estimator != "gae":
        yield (
            f"critic=True trains values that advantage_estimator={o.advantage_estimator} never reads; "
            "set --advantage-estimator gae or drop --critic"
        )
    if o.whiten_advantages and o.advantage_estimator != "gae":
        yield (
            f"whiten_advantages=True is for gae; advantage_estimator={o.advantage_estimator} compares within groups; "
            "drop --whiten-advantages"
        )
    if config.budget.zero_advantage == "exclude" and o.advantage_estimator == "gae":
        yield (
            "zero_advantage=exclude needs one advantage per response, and gae gives each token its own; set "
            "--zero-advantage count"
        )
    if o.objective == "gspo" and o.advantage_estimator == "gae":
        yield "objective=gspo has one ratio per response, gae one advantage per token; set --objective c3po"


def objective(config: RunConfig, world_size: int) -> Iterator[str]:
    """Settings that the objective never reads, or that it contradicts."""
    o, r, b = config.objective, config.rollout, config.budget
    if o.objective == "cispo" and o.eps_clip_c:
        yield f"eps_clip_c={o.eps_clip_c} does nothing in objective=cispo; set --eps-clip-c 0"
    if o.objective in _OF_RESPONSES and b.budget_overshoot == "carry":
        yield (
            f"objective={o.objective} averages over responses, budget_overshoot=carry cuts them in two; "
            "set --budget-overshoot token or --objective c3po"
        )
    if o.old_logprobs == "current" and b.minibatches_per_step > 1 and o.mismatch_correction == "none":
        yield (
            f"old_logprobs=current makes every ratio 1, so with minibatches_per_step={b.minibatches_per_step} nothing "
            "corrects minibatches after the first for the moved policy; set --old-logprobs recompute or "
            "--minibatches-per-step 1"
        )
    if o.overlong == "penalise" and not 1 <= o.overlong_buffer <= r.max_response_length:
        yield (
            f"overlong_buffer={o.overlong_buffer} must be from 1 to max_response_length="
            f"{r.max_response_length}; try {max(r.max_response_length // 4, 1)}"
        )


def mismatch(config: RunConfig, world_size: int) -> Iterator[str]:
    """A correction must compare two different log p, and its bounds must leave some tokens."""
    o, r = config.objective, config.rollout
    if o.mismatch_correction != "none" and o.old_logprobs == "rollout":
        yield (
            f"mismatch_correction={o.mismatch_correction} compares the rollout's log p with itself under "
            "old_logprobs=rollout; set --old-logprobs recompute"
        )
    if o.mismatch_correction != "none" or o.old_logprobs == "rollout":
        word = f"mismatch_correction={o.mismatch_correction}, old_logprobs={o.old_logprobs}"
        if r.top_p < 1:
            yield f"top_p={r.top_p} samples from another distribution than {word} compares; set --top-p 1"
        if r.top_k > 0:
            yield f"top_k={r.top_k} samples from another distribution than {word} compares; set --top-k 0"
    unused = ("mismatch_low", "mismatch_high") if o.mismatch_correction == "none" else ()
    if o.mismatch_correction == "tis":
        unused = ("mismatch_low",)
    for name in unused:
        if getattr(o, name) is not None:
            yield (
                f"{name}={getattr(o, name)} does nothing in mismatch_correction={o.mismatch_correction}; drop "
                f"{flag(name)} or set --mismatch-correction icepop"
            )
    low, high = mismatch_bounds(o)
    if low > high:
        yield f"mismatch_low={low} must be at most mismatch_high={high}; try 0.5 and 5"
    elif not low <= 1 <= high:
        yield (
            f"mismatch_low={low} to mismatch_high={high} leaves out 1, at which engine and trainer agree: no token would "
            "count; try 0.5 and 5"
        )


def replay(config: RunConfig, world_size: int) -> Iterator[str]:
    """Routes must be recorded before they can be replayed."""
    o, m = config.objective, config.model
    if o.routing_replay == "none":
        return
    if not m.is_moe:
        yield f"routing_replay={o.routing_replay} needs experts, num_experts=0; set --routing-replay none"
    if o.routing_replay == "R2" and o.old_logprobs != "recompute":
        yield (
            f"routing_replay=R2 records routes while old log p is scored, which old_logprobs={o.old_logprobs} "
            "leaves out; set --old-logprobs recompute or --routing-replay R3"
        )


def further_tokens(config: RunConfig, world_size: int) -> Iterator[str]:
    """Multi-token prediction is not trained by reinforcement."""
    if config.model.mtp_num_layers:
        yield (
            f"mtp_num_layers={config.model.mtp_num_layers}: reinforcement learning does not train these layers; "
            "set --mtp-num-layers 0 and convert the checkpoint without them"
        )
