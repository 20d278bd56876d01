"""Settings of reinforcement learning that are each fine and make no sense together; value, rule and remedy."""

from collections.abc import Iterator

from megatron_ring.config.run import RunConfig

_OF_RESPONSES = ("grpo", "dr_grpo", "gspo")
"""Objectives that average over whole responses."""


def rl_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """Combinations of objective, sampling, budget and model, in turn; single values are checked before."""
    yield from objective_problems(config)
    yield from _replay_problems(config)
    if config.model.mtp_num_layers:
        yield (
            f"mtp_num_layers={config.model.mtp_num_layers} would stand still while the layers under it learn; "
            "set --mtp-num-layers 0 and convert the checkpoint without them"
        )


def objective_problems(config: RunConfig) -> Iterator[str]:
    """What makes no sense in the objective."""
    o, r, b = config.objective, config.rollout, config.budget
    if o.critic and o.advantage_estimator != "gae":
        yield (
            f"critic=True trains values that advantage_estimator={o.advantage_estimator} never reads; "
            "set --advantage-estimator gae or drop --critic"
        )
    if o.objective == "c3po" and b.token_budget == 0:
        yield "token_budget=0 trains on every response, but objective=c3po divides by it; set --token-budget"
    if b.token_budget == 0 and (b.budget_overshoot == "carry" or b.budget_shortfall == "refill"):
        yield (
            f"token_budget=0 leaves nothing to carry or refill (budget_overshoot={b.budget_overshoot}, "
            f"budget_shortfall={b.budget_shortfall}); set --token-budget or drop those"
        )
    if o.objective == "gspo" and o.advantage_estimator == "gae":
        yield "objective=gspo has one ratio per response, gae one advantage per token; set --objective c3po"
    if o.objective == "cispo" and o.eps_clip_c:
        yield f"eps_clip_c={o.eps_clip_c} does nothing in objective=cispo; set --eps-clip-c 0"
    if o.objective in _OF_RESPONSES and b.budget_overshoot == "carry":
        yield (
            f"objective={o.objective} averages over responses, budget_overshoot=carry cuts them in two; "
            "set --budget-overshoot token or --objective c3po"
        )
    if o.old_logprobs == "current" and b.minibatches_per_step > 1 and o.mismatch_correction == "none":
        yield (
            f"old_logprobs=current never clips, so minibatches_per_step={b.minibatches_per_step} goes "
            "uncorrected after the first; set --old-logprobs recompute or --minibatches-per-step 1"
        )
    if o.mismatch_correction != "none" and o.old_logprobs == "rollout":
        yield (
            f"mismatch_correction={o.mismatch_correction} compares the rollout's log p with itself under "
            "old_logprobs=rollout; set --old-logprobs recompute"
        )
    if o.mismatch_correction != "none" or o.old_logprobs == "rollout":
        word = f"mismatch_correction={o.mismatch_correction}, old_logprobs={o.old_logprobs}"
        if r.top_p < 1:
            yield f"top_p={r.top_p} samples from another distribution than {word} weighs; set --top-p 1"
        if r.top_k > 0:
            yield f"top_k={r.top_k} samples from another distribution than {word} weighs; set --top-k 0"
    if o.overlong == "penalise" and not 1 <= o.overlong_buffer <= r.max_response_length:
        yield (
            f"overlong_buffer={o.overlong_buffer} must be from 1 to max_response_length="
            f"{r.max_response_length}; try {max(r.max_response_length // 4, 1)}"
        )


def _replay_problems(config: RunConfig) -> Iterator[str]:
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
