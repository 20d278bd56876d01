"""Reinforcement learning: whether the token budget can be filled, and what it can be combined with."""

from collections.abc import Iterator

from megatron_ring.config.layout import data_parallel_size
from megatron_ring.config.rl import global_token_budget, rollout_concurrency
from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import flag

_UNUSED_WITHOUT = {
    "token_budget_scope": "global",
    "budget_overshoot": "token",
    "budget_order": "shuffled",
    "budget_shortfall": "train",
}
"""Settings that have no effect without a token budget, and their defaults."""


def budget(config: RunConfig, world_size: int) -> Iterator[str]:
    """Settings of the budget that contradict one another."""
    r, b = config.rollout, config.budget
    if config.objective.objective == "c3po" and b.token_budget == 0:
        yield "token_budget=0 trains on every response, but objective=c3po divides by it; set --token-budget"
    for name, default in _UNUSED_WITHOUT.items():
        if b.token_budget == 0 and getattr(b, name) != default:
            yield (
                f"{name}={getattr(b, name)} has no effect without a token budget, and token_budget=0 is none; set "
                f"--token-budget or drop {flag(name)}"
            )
    if b.token_budget == 0 and b.minibatches_per_step > r.prompts_per_step * r.group_size:
        yield (
            f"minibatches_per_step={b.minibatches_per_step} is more than the {r.prompts_per_step}*{r.group_size} responses "
            "of a step; set --minibatches-per-step 1"
        )
    if b.budget_overshoot == "carry" and r.rollout_max_staleness == 0:
        yield (
            "rollout_max_staleness=0 drops what budget_overshoot=carry keeps for the next step; set "
            "--rollout-max-staleness 4 or --budget-overshoot token"
        )
    if b.budget_shortfall == "refill" and r.dynamic_sampling_max_rounds < 2:
        yield (
            "dynamic_sampling_max_rounds=1 leaves budget_shortfall=refill no second round; set "
            "--dynamic-sampling-max-rounds 10"
        )


def supply(config: RunConfig, world_size: int) -> Iterator[str]:
    """A budget that cannot be filled even if every response is as long as it may be."""
    r, b = config.rollout, config.budget
    if not b.token_budget:
        return
    phi = global_token_budget(b, data_parallel_size(config.parallel, world_size), world_size)
    rounds = r.dynamic_sampling_max_rounds if b.budget_shortfall == "refill" else 1
    responses = r.prompts_per_step * r.group_size * rounds
    most, remedy = responses * r.max_response_length, "--prompts-per-step"
    factors = f"{r.prompts_per_step}*{r.group_size}*{r.max_response_length}"
    made_of = f"prompts_per_step*group_size*max_response_length={factors}"
    concurrency = min(rollout_concurrency(r) or 0, r.prompts_per_step * r.group_size)
    if concurrency and (r.rollout_token_budget + concurrency - 1) * rounds < most:
        # the round that reaches the budget is decoded to its end
        most, remedy = (r.rollout_token_budget + concurrency - 1) * rounds, "--rollout-token-budget"
        made_of = f"rollout_token_budget={r.rollout_token_budget} and a round of {concurrency}"
    if rounds > 1:
        made_of += f", dynamic_sampling_max_rounds={rounds} times"
    n = b.minibatches_per_step
    scope = "" if b.token_budget_scope == "global" else f" ({b.token_budget_scope} of {b.token_budget})"
    wanted = (
        f"minibatches_per_step*token_budget={n}*{phi}{scope}={n * phi} response tokens can never be filled: "
    )
    needed = n * -(-phi // r.max_response_length)
    if n * phi > most:
        yield (
            f"{wanted}a step samples at most {most} ({made_of}); lower --token-budget or --minibatches-per-step, or "
            f"raise {remedy}"
        )
    elif b.budget_overshoot != "carry" and needed > responses:
        yield (
            f"{wanted}no response is shared by two minibatches (budget_overshoot={b.budget_overshoot}), so that they "
            f"need {needed} responses of {r.max_response_length} tokens, and a step samples {responses}; lower "
            "--token-budget or --minibatches-per-step, or raise --prompts-per-step"
        )
