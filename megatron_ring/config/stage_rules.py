"""What each stage prints, requires of its config and reads from disk, beyond the rules that all stages share."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_ring.config.layout import data_parallel_size
from megatron_ring.config.model_rules import multiples_near
from megatron_ring.config.rl import BudgetConfig, ObjectiveConfig, RewardConfig, RolloutConfig
from megatron_ring.config.rl_rules import rl_problems
from megatron_ring.config.run import DataConfig, RunConfig
from megatron_ring.config.train import TrainConfig
from megatron_ring.errors import CheckpointError, DataError

Stage = Literal["pretrain", "sft", "rl"]

_COMMON = ("model", "parallel", "train", "data", "checkpoint", "logging")
STAGE_SECTIONS: dict[Stage, tuple[str, ...]] = {
    "pretrain": _COMMON,
    "sft": (*_COMMON, "sft"),
    "rl": (*_COMMON, "rollout", "budget", "objective", "reward"),
}
"""The sections of a config that a stage reads."""

GYM_PREFIX = "reasoning_gym:"
"""What a source of problems that is generated, not read, begins with."""


def stage_problems(config: RunConfig, world_size: int, stage: Stage) -> Iterator[str]:
    """Problems of what ``stage`` alone uses, in turn."""
    if config.data.num_workers < 0:
        yield (f"num_workers={config.data.num_workers} must not be negative; 0 reads in the training process")
    if stage == "pretrain":
        yield from _corpus_problems(config.data, config.train)
        if config.data.chat_template_kwargs:
            yield "chat_template_kwargs is for conversations; drop --chat-template-kwargs in pre-training"
        return
    yield from _template_problems(config.data)
    if stage == "sft":
        yield from _sft_problems(config)
    else:
        yield from _rollout_problems(config.rollout, data_parallel_size(config.parallel, world_size))
        yield from _length_problems(config)
        yield from _budget_problems(config.budget)
        yield from _objective_problems(config.objective, config.rollout)
        yield from _reward_problems(config.reward)
        yield from rl_problems(config, world_size)


def check_inputs(config: RunConfig, stage: Stage = "pretrain") -> None:
    """Raise DataError or CheckpointError when a file or folder to read is missing; a plan needs none."""
    if stage == "pretrain":
        _check_corpus(config.data)
    elif stage == "sft":
        if not config.sft.sft_data:
            raise DataError("sft_data is empty, fine-tuning needs conversations; set --sft-data FILE.jsonl")
        for name in ("sft_data", "sft_eval_data"):
            for path in getattr(config.sft, name):
                if not Path(path).exists():
                    raise DataError(f"{name}={path} does not exist; name a JSONL file of conversations")
    else:
        if not config.rollout.prompt_data:
            raise DataError(
                "prompt_data is empty, there is nothing to ask; set --prompt-data FILE.jsonl or "
                f"{GYM_PREFIX}NAME"
            )
        for name in ("prompt_data", "eval_prompt_data"):
            for _, source in weighted(getattr(config.rollout, name)):
                if not source.startswith(GYM_PREFIX) and not Path(source).exists():
                    raise DataError(
                        f"{name}={source} does not exist; name a JSONL file of problems, or {GYM_PREFIX}NAME"
                    )
    tokenizer = config.data.tokenizer_model
    if tokenizer is None and stage != "pretrain":
        raise DataError(f"tokenizer_model is not set, stage {stage} reads text; set --tokenizer-model PATH")
    if tokenizer is not None and not Path(tokenizer).exists():
        raise DataError(f"tokenizer_model={tokenizer} does not exist; name the tokenizer's file or folder")
    checkpoint = config.checkpoint
    load = checkpoint.load
    if load is not None and load != checkpoint.save and not Path(load).is_dir():
        raise CheckpointError(f"load={load} is not a folder; name one that holds checkpoints, or drop --load")
    start = checkpoint.pretrained_checkpoint
    if start is not None and not Path(start).is_dir():
        raise CheckpointError(
            f"pretrained_checkpoint={start} is not a folder; name one that holds checkpoints"
        )


def blend(data: DataConfig) -> list[tuple[float, str]]:
    """(weight, prefix) of each corpus of a valid data_path; a single prefix has weight 1."""
    return weighted(data.data_path)


def weighted(words: Sequence[str]) -> list[tuple[float, str]]:
    """(weight, source) of each source of a valid blend; a single source has weight 1."""
    if len(words) == 1:
        return [(1.0, words[0])]
    return [(float(weight), source) for weight, source in zip(words[::2], words[1::2], strict=True)]


def _check_corpus(data: DataConfig) -> None:
    prefixes = blend(data)
    if not prefixes:
        raise DataError(
            "data_path is empty, training needs a corpus; set --data-path PREFIX of a .bin/.idx pair"
        )
    for _, prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if not Path(prefix + suffix).is_file():
                raise DataError(
                    f"data_path={prefix}: {prefix}{suffix} does not exist; write it with preprocess_data"
                )


def _template_problems(d: DataConfig) -> Iterator[str]:
    try:
        good = isinstance(json.loads(d.chat_template_kwargs or "{}"), dict)
    except (ValueError, RecursionError):
        good = False
    if not good:
        yield (
            f"chat_template_kwargs={d.chat_template_kwargs} must be a JSON object; try "
            '{"enable_thinking": false}, in quotes'
        )


def _blend_problems(name: str, words: Sequence[str], what: str) -> Iterator[str]:
    if len(words) > 1 and len(words) % 2 != 0:
        yield (f"{name} has {len(words)} words, but a blend is pairs; write weight {what} weight {what}")
    for weight in words[::2] if len(words) > 1 else ():
        if not _is_share(weight) or float(weight) == 0:
            yield f"{name} weight {weight} must be a positive number; write weight {what} weight {what}"


def _corpus_problems(d: DataConfig, t: TrainConfig) -> Iterator[str]:
    yield from _blend_problems("data_path", d.data_path, "prefix")
    shares = d.split.split(",")
    if len(shares) != 3 or not all(_is_share(share) for share in shares) or float(shares[0]) == 0:
        yield f"split={d.split} must be three shares, the first above 0; try 949,50,1"
    elif t.eval_interval > 0 and float(shares[1]) == 0:
        yield (
            f"split={d.split} leaves nothing to validate on, but eval_interval={t.eval_interval}; try "
            "949,50,1"
        )


def _is_share(word: str) -> bool:
    try:
        return 0 <= float(word) < math.inf
    except ValueError:
        return False


def _sft_problems(config: RunConfig) -> Iterator[str]:
    s, t = config.sft, config.train
    if s.sft_epochs <= 0:
        yield f"sft_epochs={s.sft_epochs} must be above 0; try 3"
    if not 0 <= s.sft_warmup_fraction < 1:
        yield f"sft_warmup_fraction={s.sft_warmup_fraction} must be from 0 to below 1; try 0.01"
    if s.sft_save_every_epoch and config.checkpoint.save is None:
        yield "sft_save_every_epoch=True needs a folder to save in; set --save FOLDER"
    if t.eval_interval > 0 and not s.sft_eval_data:
        yield (
            f"eval_interval={t.eval_interval} needs conversations to validate on; set --sft-eval-data "
            "FILE.jsonl or --eval-interval 0"
        )
    if t.loss_spike_factor:
        yield f"loss_spike_factor={t.loss_spike_factor} is for pre-training; set it to 0 in fine-tuning"
    if t.rampup_batch_size:
        yield "rampup_batch_size is for pre-training; set --rampup-batch-size none in fine-tuning"


def _rollout_problems(r: RolloutConfig, dp: int) -> Iterator[str]:
    yield from _blend_problems("prompt_data", r.prompt_data, "source")
    yield from _blend_problems("eval_prompt_data", r.eval_prompt_data, "source")
    at_least_one = (
        "eval_prompts eval_samples prompts_per_step group_size max_prompt_length max_response_length "
        "rollout_slots dynamic_sampling_max_rounds"
    )
    yield from _least(r, at_least_one, 1)
    yield from _least(r, "top_k rollout_token_budget rollout_concurrency rollout_max_staleness", 0)
    if r.prompts_per_step % dp != 0:
        yield (
            f"prompts_per_step={r.prompts_per_step} must be a multiple of data_parallel_size={dp}; try "
            f"{multiples_near(r.prompts_per_step, dp)}"
        )
    for token in r.stop_token_ids:
        if token < 0:
            yield f"stop_token_ids={token} must be a token's id; set --stop-token-ids"
    if r.temperature <= 0:
        yield f"temperature={r.temperature} must be above 0; try 1.0"
    if not 0 < r.top_p <= 1:
        yield f"top_p={r.top_p} must be above 0 and at most 1; try 1.0"
    if not 0 <= r.solve_rate_min <= r.solve_rate_max <= 1:
        yield (
            f"solve_rate_min={r.solve_rate_min} and solve_rate_max={r.solve_rate_max} must be from 0 to 1 "
            "in this order; try 0.05 and 0.95"
        )


def _length_problems(config: RunConfig) -> Iterator[str]:
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


def _budget_problems(b: BudgetConfig) -> Iterator[str]:
    yield from _least(b, "minibatches_per_step microbatch_capacity", 1)
    yield from _least(b, "token_budget", 0)


def _objective_problems(o: ObjectiveConfig, r: RolloutConfig) -> Iterator[str]:
    if o.advantage_estimator != "gae" and r.group_size < 2:
        yield (
            f"group_size={r.group_size} gives advantage_estimator={o.advantage_estimator} nothing to compare; "
            "try 16"
        )
    if o.advantage_estimator == "gae" and not o.critic:
        yield "advantage_estimator=gae needs a value model; add --critic"
    if o.eps_clip is not None and not 0 < o.eps_clip <= 1:
        yield f"eps_clip={o.eps_clip} must be above 0 and at most 1 (no lower clip); try 0.2"
    if o.eps_clip_high is not None and o.eps_clip_high <= 0:
        yield f"eps_clip_high={o.eps_clip_high} must be above 0; try 0.28, or none for eps_clip"
    if o.eps_clip_c != 0 and o.eps_clip_c <= 1:
        yield f"eps_clip_c={o.eps_clip_c} must be 0 (off) or above 1; try 3.0"
    yield from _least(o, "kl_loss_coef entropy_coef mismatch_alarm overlong_buffer", 0)
    for name in ("mismatch_low", "mismatch_high"):
        bound = getattr(o, name)
        if bound is not None and bound < 0:
            yield f"{name}={bound} must be at least 0; set --{name.replace('_', '-')}"
    for name in ("gae_gamma", "gae_lambda"):
        if not 0 <= getattr(o, name) <= 1:
            yield f"{name}={getattr(o, name)} must be from 0 to 1; try 1.0"
    if o.critic and o.critic_lr <= 0:
        yield f"critic_lr={o.critic_lr} must be positive; try 1e-5"


def _reward_problems(w: RewardConfig) -> Iterator[str]:
    yield from _least(w, "reward_workers reward_worker_judgements sandbox_memory_mb", 1)
    for name in ("reward_timeout", "sandbox_timeout"):
        if getattr(w, name) <= 0:
            yield f"{name}={getattr(w, name)} must be above 0 seconds; try 10"
    for word in w.reward_functions:
        if not re.fullmatch(r"\w+=[\w.]+:\w+", word):
            yield f"reward_functions={word} must be domain=module:function; e.g. poem=my_rewards:rhymes"


def _least(section: object, names: str, least: int) -> Iterator[str]:
    for name in names.split():
        if getattr(section, name) < least:
            yield f"{name}={getattr(section, name)} must be at least {least}; set --{name.replace('_', '-')}"
