"""Reinforcement learning: rollouts, the token budget, the objective, rewards and what keeps them stable.

Names are the paper's (Ring-lite, arXiv 2506.14731) or those that users of other frameworks know.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_ring.config.ranges import Above, AtLeast, Between, Count, CountOrOff, Registered, ZeroOrAbove
from megatron_ring.errors import ConfigError

GYM_PREFIX = "reasoning_gym:"
"""Of a source of problems that reasoning-gym generates; no file is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """What is asked, and how answers are sampled.

    Example: ``RolloutConfig(prompt_data=("math.jsonl",), prompts_per_step=512, group_size=16)``.
    """

    prompt_data: tuple[str, ...] = ()
    """Problems: a JSONL file or reasoning_gym:NAME, or a blend: weight, source, weight, source ..."""
    eval_prompt_data: tuple[str, ...] = ()
    """Held-out problems, in the same words; empty evaluates nothing."""
    eval_prompts: Count = 512
    """Held-out problems per evaluation, each asked once; all that there are where they are fewer."""
    eval_samples: Count = 1
    """Responses sampled to each held-out problem; accuracy is their mean."""
    prompts_per_step: Count = 512
    """Prompts drawn for one rollout step, summed over data-parallel processes."""
    group_size: Count = 16
    """Responses sampled to each prompt; advantages compare them with one another."""
    max_prompt_length: Count = 2048
    """Longest prompt in tokens; longer ones are left out and counted."""
    max_response_length: Count = 22528
    """Longest response in tokens, end of sequence included."""
    temperature: Annotated[float, Above(0, remedy="try 1.0")] = 1.0
    """Sampling temperature; log probabilities are taken at it."""
    top_p: Annotated[float, Above(0, at_most=1, remedy="try 1.0")] = 1.0
    """Sample from the most likely tokens that make up this share; 1 for all."""
    top_k: CountOrOff = 0
    """Sample from this many most likely tokens; 0 for all."""
    stop_token_ids: tuple[CountOrOff, ...] = ()
    """Token ids that end a response, beside the tokenizer's end of sequence and those of generation_config.json."""
    rollout_engine: Annotated[str, Registered(("inprocess",))] = "inprocess"
    """What generates responses, or module:name of your own class.

    inprocess: the trainer's own modules over a key-value cache, on the training weights.
    """
    rollout_slots: Count = 256
    """Sequences that one data-parallel process decodes at the same time; with C3PO++, rollout_concurrency."""
    rollout_token_budget: CountOrOff = 0
    """C3PO++: generation stops at this many tokens per step, summed over processes; 0 lets all finish."""
    rollout_concurrency: CountOrOff = 0
    """C3PO++: sequences decoded at the same time, summed over processes; 0 for as many as are sure to end.

    That is rollout_token_budget / max_response_length, rounded down, and one at least: with a budget below one
    response, which then takes several steps.
    """
    rollout_max_staleness: CountOrOff = 4
    """Policy versions after which a response that waits, unfinished, for its group or carried, is dropped."""
    dynamic_sampling: bool = False
    """Refill groups whose rewards are all equal with new prompts."""
    dynamic_sampling_max_rounds: Count = 10
    """Rounds of refilling in one step, or steps of C3PO++ without a lesson, after which the run stops with an error."""
    prompt_suffix: str = ""
    """Line behind every problem but code, such as: put your final answer within \\boxed{}."""
    solve_rate_min: Annotated[float, Between(0, 1, remedy="try 0.05")] = 0.0
    """Leave out problems whose recorded solve_rate is below this."""
    solve_rate_max: Annotated[float, Between(0, 1, remedy="try 0.95")] = 1.0
    """Leave out problems whose recorded solve_rate is above this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """C3PO's token budget, and the microbatches that it is packed into.

    Example: ``BudgetConfig(token_budget=409600, token_budget_scope="per_gpu", minibatches_per_step=1)``.
    """

    token_budget: CountOrOff = 409600
    """Phi: response tokens that one optimizer step trains on, in the scope of token_budget_scope.

    0 for no budget: every response is trained on, in as many microbatches as it takes (the usual recipe).
    """
    token_budget_scope: Literal["global", "per_dp_rank", "per_gpu"] = "global"
    """What token_budget counts: the whole step, one data-parallel rank, or one process (the paper, as read)."""
    minibatches_per_step: Count = 1
    """Optimizer steps fed by one rollout step, each with exactly Phi tokens of its own."""
    budget_order: Literal["shuffled", "arrival", "groups"] = "shuffled"
    """Order in which responses fill the budget: shuffled by seed, as they finished, or a prompt's side by side.

    As they finished: by round of the step, then by the tokens that each had to be given, as if all were decoded side
    by side; so the order is the same at every layout.
    """
    budget_overshoot: Literal["token", "response", "carry"] = "token"
    """The response that passes Phi: cut at the token, kept whole (eq. 3 as printed), or its rest carried."""
    zero_advantage: Literal["count", "aside"] = "count"
    """Responses without advantage count towards Phi (the paper), or are set aside first."""
    budget_shortfall: Literal["train", "refill"] = "train"
    """Fewer tokens than Phi: train on what there is, still divided by Phi, or draw more prompts.

    Prompts are drawn until the step has minibatches_per_step * Phi tokens, and, unless they are carried, a longest
    response more for each cut between two minibatches; in dynamic_sampling_max_rounds rounds at most.
    """
    microbatch_capacity: Count = 32768
    """Token slots of one RL microbatch on one data-parallel rank, prompts included.

    It bounds the memory; how many microbatches a step has follows from what it trains on.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What an RL step minimises.

    Example: ``ObjectiveConfig(objective="c3po", eps_clip=0.2, kl_loss_coef=1e-3, entropy_coef=5e-4)``.
    """

    objective: Annotated[str, Registered(("c3po", "grpo", "dapo", "dr_grpo", "gspo", "cispo"))] = "c3po"
    """Loss of the policy: its ratio, clipping and denominator. Of your own: a PolicyLoss as module:name."""
    advantage_estimator: Annotated[str, Registered(("group_norm", "group_mean", "rloo", "gae"))] = (
        "group_norm"
    )
    """group_norm: (R - mean) / (std + 1e-6); group_mean: R - mean; rloo: leave one out; gae: with critic.

    Of your own: a function of one group's rewards, as module:name.
    """
    eps_clip: Annotated[float, Above(0, at_most=1, remedy="try 0.2, or 1 for no lower clip")] | None = None
    """Lower clip of the probability ratio, 1 - eps_clip; none means 0.2, and no lower clip for cispo."""
    eps_clip_high: Annotated[float, Above(0, remedy="try 0.28, or none for eps_clip")] | None = None
    """Upper clip, 1 + eps_clip_high; none means eps_clip, and 0.2 where that is none."""
    eps_clip_c: Annotated[float, ZeroOrAbove(1, remedy="try 3.0")] = 0.0
    """Dual clip: bound of the loss where the advantage is negative; 0 for none, else above 1."""
    kl_loss_coef: Annotated[float, AtLeast(0)] = 1e-3
    """Weight of the divergence from the reference policy; 0 keeps no reference."""
    kl_loss_type: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the divergence per token."""
    entropy_coef: Annotated[float, AtLeast(0)] = 5e-4
    """Weight of the entropy bonus over the full vocabulary."""
    overlong: Literal["keep", "mask", "penalise"] = "keep"
    """Responses cut at max_response_length: keep their reward, no loss on them, or a soft length penalty."""
    overlong_buffer: CountOrOff = 4096
    """Tokens before max_response_length over which the penalty grows from 0 to 1 (overlong=penalise)."""
    old_logprobs: Literal["recompute", "rollout", "current"] = "recompute"
    """Denominator of the ratio: scored by the trainer before the update, the engine's, or the pass itself."""
    mismatch_correction: Literal["none", "icepop", "tis", "mis", "mask"] = "none"
    """Weight of a token's loss, from k = pi_train_old / pi_rollout.

    icepop and mis: k inside the bounds, 0 outside (they differ in their bounds); tis: min(k, upper bound); mask: 1
    inside, 0 outside.
    """
    mismatch_low: Annotated[float, AtLeast(0)] | None = None
    """Lower bound of k; none means 0.5. tis has none."""
    mismatch_high: Annotated[float, AtLeast(0)] | None = None
    """Upper bound of k; none means 5 (icepop, mask) or 2 (tis, mis)."""
    mismatch_alarm: Annotated[float, AtLeast(0)] = 0.1
    """Warn when rollout and trainer log p, of the same weights, differ by more than this on average."""
    routing_replay: Literal["none", "R2", "R3"] = "none"
    """Train through recorded expert choices: the old policy's (R2) or the rollout engine's (R3)."""
    critic: bool = False
    """Train a value model beside the policy (PPO); advantage_estimator=gae needs it."""
    critic_lr: Annotated[float, Above(0, remedy="try 1e-5")] = 1e-5
    """Learning rate of the value model."""
    gae_gamma: Annotated[float, Between(0, 1, remedy="try 1.0")] = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, Between(0, 1, remedy="try 1.0")] = 1.0
    """Trade of bias for variance in generalised advantage estimation."""
    whiten_advantages: bool = False
    """gae only: shift and scale the step's advantages to mean 0 and deviation 1 over its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """Who judges answers.

    Example: ``RewardConfig(reward_functions=("poem=my_rewards:rhymes",), reward_workers=8)``.
    """

    reward_functions: tuple[str, ...] = ()
    """Reward functions beside the built-in ones, as domain=module:function."""
    reward_workers: Count = 2
    """Verifier processes of one data-parallel process."""
    reward_timeout: Annotated[float, Above(0, remedy="try 10 seconds")] = 10.0
    """Seconds after which a verifier is killed and its response scored 0; code has the time of its tests instead."""
    reward_worker_judgements: Count = 1000
    """Judgements after which a verifier process is replaced by a fresh one, with whatever it has leaked."""
    sandbox_memory_mb: Count = 512
    """Memory that model-written code may use; a problem's own memory_limit_mb counts up to 4 times this."""
    sandbox_timeout: Annotated[float, Above(0, remedy="try 5 seconds")] = 5.0
    """CPU seconds per test that model-written code may use; a problem's own time_limit counts up to 4 times this."""


def global_token_budget(config: BudgetConfig, dp_size: int, world_size: int) -> int:
    """Phi in response tokens per optimizer step, summed over the whole job.

    Example: ``global_token_budget(BudgetConfig(token_budget=409600, token_budget_scope="per_gpu"), 64, 256)``
    is 104857600.

    Raises:
        ConfigError: token_budget is not positive.
    """
    if config.token_budget < 1:
        raise ConfigError(
            f"token_budget={config.token_budget} must be positive; the paper's is 409600 per GPU"
        )
    scopes = {"global": 1, "per_dp_rank": dp_size, "per_gpu": world_size}
    return config.token_budget * scopes[config.token_budget_scope]


def rollout_concurrency(config: RolloutConfig) -> int | None:
    """Sequences that C3PO++ decodes at the same time, summed over processes; None without C3PO++.

    By default so few that all of them are sure to end within one step's tokens, and one at least.
    Example: ``rollout_concurrency(RolloutConfig(rollout_token_budget=100_000, max_response_length=4096))`` is 24.
    """
    if not config.rollout_token_budget:
        return None
    return config.rollout_concurrency or max(config.rollout_token_budget // config.max_response_length, 1)


_MISMATCH_BOUNDS = {
    "none": (0.0, math.inf),
    "icepop": (0.5, 5.0),
    "tis": (0.0, 2.0),
    "mis": (0.5, 2.0),
    "mask": (0.5, 5.0),
}


def mismatch_bounds(config: ObjectiveConfig) -> tuple[float, float]:
    """Bounds of k = pi_train_old / pi_rollout in mismatch_correction: the settings', else the method's own.

    IcePop's are its paper's (arXiv 2510.18855), the others' those that verl's users know.
    Example: ``mismatch_bounds(ObjectiveConfig(mismatch_correction="tis"))`` is ``(0.0, 2.0)``.
    """
    low, high = _MISMATCH_BOUNDS[config.mismatch_correction]
    return (
        low if config.mismatch_low is None else config.mismatch_low,
        high if config.mismatch_high is None else config.mismatch_high,
    )


def clip_bounds(config: ObjectiveConfig) -> tuple[float, float]:
    """Lower and upper clip of the probability ratio.

    CISPO (arXiv 2506.13585) clips from above alone. Example: eps_clip 0.2 alone gives ``(0.8, 1.2)``.
    """
    own = config.eps_clip
    low = (1.0 if config.objective == "cispo" else 0.2) if own is None else own
    high = config.eps_clip_high
    if high is None:
        high = 0.2 if own is None else own
    return 1.0 - low, 1.0 + high
