"""Settings of reinforcement learning that are each fine and make no sense together; value, rule and remedy."""

from collections.abc import Iterator

from megatron_ring.config.layout import data_parallel_size
from megatron_ring.config.rl import global_token_budget, mismatch_bounds, rollout_concurrency
from megatron_ring.config.run import RunConfig

_OF_RESPONSES = ("grpo", "dr_grpo", "gspo")
"""Objectives that average over whole responses."""


def rl_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """Combinations of objective, sampling, budget and model, in turn; single values are checked before."""
    yield from objective_problems(config)
    yield from _mismatch_problems(config)
    yield from _replay_problems(config)
    yield from _sampling_problems(config)
    yield from _supply_problems(config, world_size)
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
    unread = {
        "token_budget_scope": "global",
        "budget_overshoot": "token",
        "budget_order": "shuffled",
        "budget_shortfall": "train",
    }
    for name, default in unread.items():
        if b.token_budget == 0 and getattr(b, name) != default:
            yield (
                f"{name}={getattr(b, name)} says how a budget is filled, and token_budget=0 is none; set "
                f"--token-budget or drop --{name.replace('_', '-')}"
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
    if o.whiten_advantages and o.advantage_estimator != "gae":
        yield (
            f"whiten_advantages=True is for gae; advantage_estimator={o.advantage_estimator} compares within groups; "
            "drop --whiten-advantages"
        )
    if b.zero_advantage == "aside" and o.advantage_estimator == "gae":
        yield (
            "zero_advantage=aside looks for responses without advantage, gae gives each token its own; set "
            "--zero-advantage count"
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
    if o.overlong == "penalise" and not 1 <= o.overlong_buffer <= r.max_response_length:
        yield (
            f"overlong_buffer={o.overlong_buffer} must be from 1 to max_response_length="
            f"{r.max_response_length}; try {max(r.max_response_length // 4, 1)}"
        )


def _mismatch_problems(config: RunConfig) -> Iterator[str]:
    o, r = config.objective, config.rollout
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
    unused = ("mismatch_low", "mismatch_high") if o.mismatch_correction == "none" else ()
    if o.mismatch_correction == "tis":
        unused = ("mismatch_low",)
    for name in unused:
        if getattr(o, name) is not None:
            yield (
                f"{name}={getattr(o, name)} does nothing in mismatch_correction={o.mismatch_correction}; drop "
                f"--{name.replace('_', '-')} or set --mismatch-correction icepop"
            )
    low, high = mismatch_bounds(o)
    if low > high:
        yield f"mismatch_low={low} must be at most mismatch_high={high}; try 0.5 and 5"
    elif not low <= 1 <= high:
        yield (
            f"mismatch_low={low} to mismatch_high={high} leaves out 1, at which engine and trainer agree: no token would "
            "count; try 0.5 and 5"
        )


def _sampling_problems(config: RunConfig) -> Iterator[str]:
    """Settings of generation that can never give what training waits for."""
    r = config.rollout
    if r.dynamic_sampling and r.group_size < 2:
        yield (
            f"group_size={r.group_size} with dynamic_sampling: a response that is alone never differs from its group, "
            "so none is kept; drop --dynamic-sampling or set --group-size 16"
        )
    if r.rollout_concurrency and not r.rollout_token_budget:
        yield (
            f"rollout_concurrency={r.rollout_concurrency} is for C3PO++; set --rollout-token-budget, or "
            "--rollout-slots instead"
        )
    concurrency = rollout_concurrency(r)
    if concurrency is None:
        return
    together = max(min(concurrency, r.prompts_per_step * r.group_size), r.group_size)
    steps = -(-together * r.max_response_length // r.rollout_token_budget)
    # a response that begins at the end of a step has as many whole steps left as it may grow old
    allowed = max(r.rollout_max_staleness, 1)
    if steps > allowed:
        least = -(-together * r.max_response_length // allowed)
        yield (
            f"rollout_token_budget={r.rollout_token_budget} may take {steps} steps to end {together} responses of "
            f"max_response_length={r.max_response_length} (rollout_concurrency, or a group), but rollout_max_staleness="
            f"{r.rollout_max_staleness} drops what waits longer than {allowed}; set --rollout-token-budget {least} or more"
        )


def refills(config: RunConfig) -> bool:
    """Are more prompts drawn where the budget's tokens are missing?"""
    return config.budget.budget_shortfall == "refill"


def _supply_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """A budget that cannot be filled even if every response is as long as it may be."""
    r, b = config.rollout, config.budget
    if not b.token_budget:
        return
    phi = global_token_budget(b, data_parallel_size(config.parallel, world_size), world_size)
    rounds = r.dynamic_sampling_max_rounds if refills(config) else 1
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
    budget = (
        f"minibatches_per_step*token_budget={n}*{phi}{scope}={n * phi} response tokens can never be filled: "
    )
    needed = n * -(-phi // r.max_response_length)
    if n * phi > most:
        yield (
            f"{budget}a step samples at most {most} ({made_of}); lower --token-budget or --minibatches-per-step, or "
            f"raise {remedy}"
        )
    elif b.budget_overshoot != "carry" and needed > responses:
        yield (
            f"{budget}no response is shared by two minibatches (budget_overshoot={b.budget_overshoot}), so that they "
            f"need {needed} responses of {r.max_response_length} tokens, and a step samples {responses}; lower "
            "--token-budget or --minibatches-per-step, or raise --prompts-per-step"
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
