"""Reinforcement learning: rollouts, the token budget, the objective and rewards.

Names are those of the paper (Ring-lite, arXiv 2506.14731) or of the frameworks that users know.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_ring.config.ranges import Above, AtLeast, Between, Count, CountOrOff, OneOf, ZeroOrAbove
from megatron_ring.errors import ConfigError

GYM_PREFIX = "reasoning_gym:"
"""Prefix of a prompt source that reasoning-gym generates."""
OBJECTIVES = ("c3po", "grpo", "dapo", "dr_grpo", "gspo", "cispo")
ESTIMATORS = ("group_norm", "group_mean", "rloo", "gae")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Prompts, and how responses to them are sampled.

    Example: ``RolloutConfig(prompt_data=("math.jsonl",), prompts_per_step=512, group_size=16)``.
    """

    prompt_data: tuple[str, ...] = ()
    """Source of problems: a JSONL file or reasoning_gym:NAME. Several: weight, source, weight, source ..."""
    eval_prompt_data: tuple[str, ...] = ()
    """Source of held-out problems, written like prompt_data; empty for no evaluation."""
    eval_prompts: Count = 512
    """Held-out problems per evaluation, each used once; all of them if there are fewer."""
    eval_samples: Count = 1
    """Responses sampled for each held-out problem; accuracy is the mean over them."""
    prompts_per_step: Count = 512
    """Prompts drawn for one rollout step, summed over data-parallel processes."""
    group_size: Count = 16
    """Responses sampled for each prompt; their advantages are relative to the group."""
    max_prompt_length: Count = 2048
    """Longest prompt in tokens; longer prompts are skipped and counted."""
    max_response_length: Count = 22528
    """Longest response in tokens, including the end of sequence."""
    temperature: Annotated[float, Above(0, remedy="try 1.0")] = 1.0
    """Sampling temperature; the trainer computes log probabilities at the same temperature."""
    top_p: Annotated[float, Above(0, at_most=1, remedy="try 1.0")] = 1.0
    """Nucleus sampling: sample from the most likely tokens with this total probability; 1 for all tokens."""
    top_k: CountOrOff = 0
    """Sample from this many most likely tokens; 0 for all tokens."""
    stop_token_ids: tuple[CountOrOff, ...] = ()
    """More token ids that end a response, beside the tokenizer's and those of generation_config.json."""
    rollout_engine: Annotated[str, OneOf(("inprocess",), importable=True)] = "inprocess"
    """What generates responses, or module:name of your own class.

    inprocess: the trainer's own modules over a key-value cache, on the training weights.
    """
    rollout_slots: Count = 256
    """Sequences that one data-parallel process decodes at a time; C3PO++ uses rollout_concurrency instead."""
    rollout_token_budget: CountOrOff = 0
    """C3PO++: tokens generated per step, summed over processes; unfinished responses continue in the next step.

    0 for no limit: every response of a step is generated to its end.
    """
    rollout_concurrency: CountOrOff = 0
    """C3PO++: sequences decoded at a time, summed over processes; 0 for as many as are sure to finish in one step.

    That is rollout_token_budget / max_response_length, rounded down, and at least 1.
    """
    rollout_max_staleness: CountOrOff = 4
    """A response that waits (unfinished, carried, or for its group) is dropped once a token of it is older than this.

    Counted in policy versions: one per rollout step.
    """
    dynamic_sampling: bool = False
    """Replace groups in which all rewards are equal by groups of new prompts."""
    dynamic_sampling_max_rounds: Count = 10
    """Most rounds of new prompts in one step; dynamic sampling that still lacks groups stops the run with an error.

    With C3PO++ it does so after this many steps in a row without a group of unequal rewards.
    """
    prompt_suffix: str = ""
    """Line added to every problem except code, such as: put your final answer within \\boxed{}."""
    solve_rate_min: Annotated[float, Between(0, 1, remedy="try 0.05")] = 0.0
    """Skip problems with a recorded solve_rate below this."""
    solve_rate_max: Annotated[float, Between(0, 1, remedy="try 0.95")] = 1.0
    """Skip problems with a recorded solve_rate above this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """C3PO's token budget, and the microbatches it is packed into.

    Example: ``BudgetConfig(token_budget=409600, token_budget_scope="per_gpu", minibatches_per_step=1)``.
    """

    token_budget: CountOrOff = 409600
    """Phi: response tokens of one optimizer step, counted as token_budget_scope says.

    0 for no budget: the step trains on every response, as most recipes do.
    """
    token_budget_scope: Literal["global", "per_dp_rank", "per_gpu"] = "global"
    """Who gets token_budget tokens: the whole job, each data-parallel rank, or each process (the paper's "per GPU")."""
    minibatches_per_step: Count = 1
    """Optimizer steps per rollout step; each trains on another Phi tokens."""
    budget_order: Literal["shuffled", "arrival", "groups"] = "shuffled"
    """Order in which responses fill the budget.

    shuffled: at random, by seed; arrival: as they finish, which favours short ones; groups: prompt by prompt.
    Arrival counts rounds, then generated tokens, not seconds: it is the same at every layout.
    """
    budget_overshoot: Literal["token", "response", "carry"] = "token"
    """What happens to the response that passes Phi.

    token: cut there, its rest is lost; response: kept whole (eq. 3 as printed); carry: cut, and the next
    minibatch or step trains on its rest.
    """
    zero_advantage: Literal["count", "exclude"] = "count"
    """Responses with advantage 0: count them towards Phi (the paper), or exclude them before the budget is filled."""
    budget_shortfall: Literal["train", "refill"] = "train"
    """If a step has fewer tokens than Phi: train on them and still divide by Phi, or refill from more prompts.

    Refilling stops at minibatches_per_step * Phi tokens, plus max_response_length for each cut between two minibatches
    (none with budget_overshoot=carry), and after dynamic_sampling_max_rounds rounds.
    """
    microbatch_capacity: Count = 32768
    """Tokens of one RL microbatch on one data-parallel rank, prompts included. It bounds the memory.

    A step has as many microbatches as its tokens need.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What an RL step minimises.

    Example: ``ObjectiveConfig(objective="c3po", eps_clip=0.2, kl_loss_coef=1e-3, entropy_coef=5e-4)``.
    """

    objective: Annotated[str, OneOf(OBJECTIVES, importable=True)] = "c3po"
    """Policy loss: its probability ratio, clipping and denominator. Your own: module:name of a PolicyLoss."""
    advantage_estimator: Annotated[str, OneOf(ESTIMATORS, importable=True)] = "group_norm"
    """group_norm: (R - mean) / (std + 1e-6); group_mean: R - mean; rloo: R - mean of the others; gae: with a critic.

    Your own: module:name of a function from one group's rewards to its advantages.
    """
    eps_clip: Annotated[float, Above(0, at_most=1, remedy="try 0.2, or 1 for no lower clip")] | None = None
    """The ratio is clipped from below at 1 - eps_clip; none means 0.2, and for cispo no lower clip."""
    eps_clip_high: Annotated[float, Above(0, remedy="try 0.28, or none for eps_clip")] | None = None
    """The ratio is clipped from above at 1 + eps_clip_high; none means eps_clip, or 0.2 if that is none too."""
    eps_clip_c: Annotated[float, ZeroOrAbove(1, remedy="try 3.0")] = 0.0
    """Dual clip: with a negative advantage A the surrogate is at least eps_clip_c * A."""
    kl_loss_coef: Annotated[float, AtLeast(0)] = 1e-3
    """Weight of the KL divergence from the reference policy; 0 for no reference policy."""
    kl_loss_type: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence per token."""
    entropy_coef: Annotated[float, AtLeast(0)] = 5e-4
    """Weight of the entropy bonus; the entropy is over the full vocabulary."""
    overlong: Literal["keep", "mask", "penalise"] = "keep"
    """Responses cut at max_response_length: keep their reward, mask their loss, or penalise by length (DAPO)."""
    overlong_buffer: CountOrOff = 4096
    """penalise only: the penalty grows from 0 to 1 over the last this many tokens before max_response_length."""
    old_logprobs: Literal["recompute", "rollout", "current"] = "recompute"
    """Old log p in the ratio: recomputed by the trainer before the update, the rollout engine's, or the current pass's."""
    mismatch_correction: Literal["none", "icepop", "tis", "mis", "mask"] = "none"
    """Weight of a token's loss, a function of k = pi_train_old / pi_rollout.

    icepop and mis: k inside the bounds, 0 outside (they differ in their bounds); tis: min(k, upper bound); mask: 1
    inside, 0 outside.
    """
    mismatch_low: Annotated[float, AtLeast(0)] | None = None
    """Lower bound of k; none means 0.5. Not for tis."""
    mismatch_high: Annotated[float, AtLeast(0)] | None = None
    """Upper bound of k; none means 5 (icepop, mask) or 2 (tis, mis)."""
    mismatch_alarm: Annotated[float, AtLeast(0)] = 0.1
    """Warn if log p of rollout engine and trainer, under the same weights, differ by more than this on average."""
    routing_replay: Literal["none", "R2", "R3"] = "none"
    """Train with recorded routes instead of the router's: those of the old policy (R2) or the rollout engine (R3)."""
    critic: bool = False
    """Train a value model beside the policy (PPO), for advantage_estimator=gae."""
    critic_lr: Annotated[float, Above(0, remedy="try 1e-5")] = 1e-5
    """Learning rate of the value model."""
    gae_gamma: Annotated[float, Between(0, 1, remedy="try 1.0")] = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, Between(0, 1, remedy="try 1.0")] = 1.0
    """Lambda of generalised advantage estimation: lower has more bias and less variance."""
    whiten_advantages: bool = False
    """gae only: shift and scale a step's advantages to mean 0 and standard deviation 1 over its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """Reward functions, and the processes they run in.

    Example: ``RewardConfig(reward_functions=("poem=my_rewards:rhymes",), reward_workers=8)``.
    """

    reward_functions: tuple[str, ...] = ()
    """Your own reward functions, as domain=module:function; a built-in domain is replaced."""
    reward_workers: Count = 2
    """Verifier processes of one data-parallel process."""
    reward_timeout: Annotated[float, Above(0, at_most=86_400, remedy="try 10 seconds")] = 10.0
    """Seconds until a verifier is killed and the response scored 0; for code the time limits of its tests hold."""
    reward_worker_judgements: Count = 1000
    """Responses after which a verifier process is replaced by a new one, so that leaks stay bounded."""
    sandbox_memory_mb: Count = 512
    """MB of memory for model-written code; a problem's memory_limit_mb may ask for up to 4 times this."""
    sandbox_timeout: Annotated[float, Above(0, at_most=86_400, remedy="try 5 seconds")] = 5.0
    """CPU seconds per test of model-written code; a problem's time_limit may ask for up to 4 times this."""


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

    By default as many as are sure to finish within one step's tokens, and at least 1.
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
    """Bounds of k = pi_train_old / pi_rollout: those of the settings, else those of the method.

    IcePop's are from its paper (arXiv 2510.18855), the others are verl's.
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
