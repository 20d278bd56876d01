"""Reinforcement learning: prompts, sampling, and reward functions."""

from collections.abc import Iterator

from megatron_ring.config.blend import blend_problems
from megatron_ring.config.layout import data_parallel_size
from megatron_ring.config.rl import rollout_concurrency
from megatron_ring.config.rules.words import multiples_near
from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import is_importable


def prompts(config: RunConfig, world_size: int) -> Iterator[str]:
    """Blends of problems, and as many prompts for every data-parallel rank."""
    r, dp = config.rollout, data_parallel_size(config.parallel, world_size)
    yield from blend_problems("prompt_data", r.prompt_data, "source")
    yield from blend_problems("eval_prompt_data", r.eval_prompt_data, "source")
    if r.prompts_per_step % dp != 0:
        yield (
            f"prompts_per_step={r.prompts_per_step} must be a multiple of data_parallel_size={dp}; try "
            f"{multiples_near(r.prompts_per_step, dp)}"
        )
    if r.solve_rate_min > r.solve_rate_max:
        yield (
            f"solve_rate_min={r.solve_rate_min} and solve_rate_max={r.solve_rate_max} must be from 0 to 1 "
            "in this order; try 0.05 and 0.95"
        )


def lengths(config: RunConfig, world_size: int) -> Iterator[str]:
    """The longest prompt and response fit the model and one microbatch."""
    r, capacity = config.rollout, config.budget.microbatch_capacity
    longest = r.max_prompt_length + r.max_response_length
    shown = f"max_prompt_length+max_response_length={r.max_prompt_length}+{r.max_response_length}={longest}"
    if longest > config.model.max_position_embeddings:
        yield (
            f"{shown} must be at most max_position_embeddings={config.model.max_position_embeddings}; "
            "shorten one or set --max-position-embeddings"
        )
    if longest > capacity:
        yield f"{shown} must fit into microbatch_capacity={capacity}; set --microbatch-capacity {longest}"
    tp = config.parallel.tensor_model_parallel_size
    if config.parallel.sequence_parallel and capacity % tp != 0:
        yield (
            f"microbatch_capacity={capacity} must be a multiple of tensor_model_parallel_size={tp}; try "
            f"{multiples_near(capacity, tp)}"
        )


def sampling(config: RunConfig, world_size: int) -> Iterator[str]:
    """Settings of generation under which training would never take a step."""
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
    # a response that begins at the end of a step may take rollout_max_staleness whole steps more
    allowed = max(r.rollout_max_staleness, 1)
    if steps > allowed:
        least = -(-together * r.max_response_length // allowed)
        yield (
            f"rollout_token_budget={r.rollout_token_budget} may take {steps} steps to end {together} responses of "
            f"max_response_length={r.max_response_length} (rollout_concurrency, or a group), but rollout_max_staleness="
            f"{r.rollout_max_staleness} drops what waits longer than {allowed}; set --rollout-token-budget {least} or more"
        )


def rewards(config: RunConfig, world_size: int) -> Iterator[str]:
    """A user's reward functions, in the form domain=module:function."""
    for word in config.reward.reward_functions:
        domain, _, path = word.partition("=")
        if not (domain.isidentifier() and is_importable(path)):
            yield f"reward_functions={word} must be domain=module:function; e.g. poem=my_rewards:rhymes"
