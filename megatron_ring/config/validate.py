"""Every rule a run's config must satisfy, checked in one place before any process group exists.

``validate`` looks at the config and the number of processes only; ``check_inputs`` looks at the files it
names. What one stage alone needs is in ``stage_rules``.
"""

import math
from collections.abc import Iterator

from megatron_ring.config.dump import flat
from megatron_ring.config.layout import data_parallel_size, expert_parallel_size, model_parallel_size
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.model_rules import division_problems, model_problems, multiples_near
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.run import CheckpointConfig, LoggingConfig, RunConfig
from megatron_ring.config.settings import settings, type_problem
from megatron_ring.config.stage_rules import Stage, blend, check_inputs, stage_problems
from megatron_ring.config.train import TrainConfig
from megatron_ring.errors import ConfigError

__all__ = ["blend", "check_inputs", "problems", "schedule_problems", "validate"]


def validate(config: RunConfig, world_size: int, stage: Stage = "pretrain") -> None:
    """Raise ConfigError with the first problem of running ``config`` on ``world_size`` processes."""
    for problem in problems(config, world_size, stage):
        raise ConfigError(problem)


def problems(config: RunConfig, world_size: int, stage: Stage = "pretrain") -> Iterator[str]:
    """Every problem in turn; a rule may rely on those before it, so only the first is sure to be real."""
    yield from _value_problems(config)
    yield from model_problems(config.model)
    yield from _feature_problems(config.parallel)
    yield from _recompute_problems(config.model, config.parallel)
    yield from division_problems(config.model, config.parallel)
    yield from _world_problems(config.parallel, world_size)
    yield from _size_problems(config, derives_steps=stage == "sft")
    if stage != "rl":
        yield from _batch_problems(config.train, config.parallel, world_size)
    yield from schedule_problems(config.train)
    yield from _step_problems(config.train)
    yield from _checkpoint_problems(config.checkpoint)
    yield from _logging_problems(config.logging)
    yield from stage_problems(config, world_size, stage)


def _value_problems(config: RunConfig) -> Iterator[str]:
    for name, value in flat(config).items():
        problem = type_problem(settings()[name], value)
        if problem is not None:
            yield f"{problem}; set {settings()[name].flag}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{name}={value} must be finite; set {settings()[name].flag}"


def _feature_problems(p: ParallelConfig) -> Iterator[str]:
    if p.context_parallel_size != 1:
        yield (
            f"context_parallel_size={p.context_parallel_size} is not supported; set it to 1 and shard by tp "
            "or pp"
        )
    if p.fp8 is not None:
        yield f"fp8={p.fp8} is not supported; drop --fp8 and use --bf16"
    sizes = (
        "tensor_model_parallel_size pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank "
        "expert_model_parallel_size expert_tensor_parallel_size recompute_num_layers "
        "distributed_timeout_minutes"
    )
    for name in sizes.split():
        if getattr(p, name) < 1:
            yield f"{name}={getattr(p, name)} must be at least 1; set --{name.replace('_', '-')} 1"
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        yield (
            "sequence_parallel=True needs tensor_model_parallel_size > 1; "
            "add --no-sequence-parallel or raise tensor_model_parallel_size"
        )
    if p.overlap_param_gather and not p.use_distributed_optimizer:
        yield "overlap_param_gather=True needs use_distributed_optimizer; add --use-distributed-optimizer"
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        yield "overlap_param_gather=True needs overlap_grad_reduce; add --overlap-grad-reduce"


def _recompute_problems(m: ModelConfig, p: ParallelConfig) -> Iterator[str]:
    if p.recompute_granularity != "selective":
        return
    if not p.recompute_modules:
        yield (
            "recompute_modules is empty with recompute_granularity=selective; "
            "name modules, such as core_attn, or set --recompute-granularity none"
        )
    needs = (
        ("mlp", not m.is_moe or m.first_k_dense_replace > 0, "a layer without experts"),
        ("moe", m.is_moe, "num_experts > 0"),
        (
            "shared_experts",
            m.moe_shared_expert_intermediate_size > 0,
            "moe_shared_expert_intermediate_size > 0",
        ),
    )
    for name, has, what in needs:
        if name in p.recompute_modules and not has:
            yield (
                f"recompute_modules={' '.join(p.recompute_modules)}: {name} needs {what}, which the model does "
                f"not have; drop {name}"
            )


def _world_problems(p: ParallelConfig, world_size: int) -> Iterator[str]:
    pp = p.pipeline_model_parallel_size
    tp, etp, ep = p.tensor_model_parallel_size, p.expert_tensor_parallel_size, p.expert_model_parallel_size
    rules = (
        ("tensor_model_parallel_size*pipeline_model_parallel_size", f"{tp}*{pp}", model_parallel_size(p)),
        (
            "expert_tensor_parallel_size*expert_model_parallel_size*pipeline_model_parallel_size",
            f"{etp}*{ep}*{pp}",
            expert_parallel_size(p),
        ),
    )
    for names, values, size in rules:
        if world_size % size != 0 or world_size < 1:
            yield (
                f"world_size={world_size} must be a multiple of {names}={values}={size}; "
                f"start {multiples_near(world_size, size)} processes"
            )


def _size_problems(config: RunConfig, *, derives_steps: bool) -> Iterator[str]:
    t, p = config.train, config.parallel
    for name in ("micro_batch_size", "global_batch_size", "seq_length", "train_iters"):
        least = 0 if derives_steps and name == "train_iters" else 1
        if getattr(t, name) < least:
            yield f"{name}={getattr(t, name)} must be at least {least}; set --{name.replace('_', '-')}"
    if t.seq_length > config.model.max_position_embeddings:
        yield (
            f"seq_length={t.seq_length} must be at most max_position_embeddings="
            f"{config.model.max_position_embeddings}; shorten it or set --max-position-embeddings"
        )
    capacity, tp = t.micro_batch_size * t.seq_length, p.tensor_model_parallel_size
    if p.sequence_parallel and capacity % tp != 0:
        yield (
            f"micro_batch_size*seq_length={t.micro_batch_size}*{t.seq_length}={capacity} must be a multiple "
            "of "
            f"tensor_model_parallel_size={tp}; try seq_length={multiples_near(t.seq_length, tp)}"
        )


def _batch_problems(t: TrainConfig, p: ParallelConfig, world_size: int) -> Iterator[str]:
    dp = data_parallel_size(p, world_size)
    yield from _rampup_problems(t, t.micro_batch_size * dp)
    for batch in _batch_sizes(t):
        yield from _batch_size_problems(t, p, batch, dp)


def _batch_sizes(t: TrainConfig) -> list[int]:
    """Every global batch size of the run, the full one first."""
    if t.rampup_batch_size is None:
        return [t.global_batch_size]
    start, increment, _ = t.rampup_batch_size
    return [t.global_batch_size, *range(start, t.global_batch_size, increment)]


def _batch_size_problems(t: TrainConfig, p: ParallelConfig, batch: int, dp: int) -> Iterator[str]:
    per_pass = t.micro_batch_size * dp
    ramp = batch != t.global_batch_size
    shown = f"batch size {batch} of rampup_batch_size" if ramp else f"global_batch_size={batch}"
    if batch % per_pass != 0:
        yield (
            f"{shown} must be a multiple of micro_batch_size*data_parallel_size="
            f"{t.micro_batch_size}*{dp}={per_pass}; try {multiples_near(batch, per_pass)}"
        )
        return
    pp, passes = p.pipeline_model_parallel_size, batch // per_pass
    if p.num_virtual_stages_per_pipeline_rank > 1 and passes % pp != 0:
        yield (
            f"{shown} gives {passes} microbatches per rank, which must be a multiple of "
            f"pipeline_model_parallel_size={pp} with virtual stages; try "
            f"{multiples_near(batch, pp * per_pass)}"
        )


def _rampup_problems(t: TrainConfig, per_pass: int) -> Iterator[str]:
    if t.rampup_batch_size is None:
        return
    start, increment, samples = t.rampup_batch_size
    shown = f"rampup_batch_size={start} {increment} {samples}"
    if start < 1 or increment < 1 or samples < 1:
        yield f"{shown}: start, increment and samples must be positive; try {per_pass} {per_pass} 1000"
        return
    if start > t.global_batch_size:
        yield f"{shown}: start must be at most global_batch_size={t.global_batch_size}; try {per_pass}"
    for name, value in (("start", start), ("increment", increment)):
        if value % per_pass != 0:
            yield (
                f"{shown}: {name} {value} must be a multiple of "
                f"micro_batch_size*data_parallel_size={per_pass}; "
                f"try {multiples_near(value, per_pass)}"
            )
    if (t.global_batch_size - start) % increment != 0:
        yield (
            f"{shown}: increment must divide global_batch_size-start={t.global_batch_size - start}; "
            f"try increment {per_pass}"
        )


def schedule_problems(t: TrainConfig) -> Iterator[str]:
    """What is wrong with the learning rate's schedule."""
    if t.lr <= 0:
        yield f"lr={t.lr} must be positive; try 3e-4"
    if not 0 <= t.min_lr <= t.lr:
        yield f"min_lr={t.min_lr} must be from 0 to lr={t.lr}; try {t.lr / 10:g}"
    end_name = "train_iters" if t.lr_decay_iters is None else "lr_decay_iters"
    end = t.train_iters if t.lr_decay_iters is None else t.lr_decay_iters
    if end_name == "train_iters" and end == 0:
        # the stage derives its steps from the data, and looks again when it knows them
        return
    if end < 1:
        yield f"lr_decay_iters={end} must be at least 1; drop it to decay over train_iters"
    if not 0 <= t.lr_warmup_iters < end:
        yield (
            f"lr_warmup_iters={t.lr_warmup_iters} must be from 0 to below {end_name}={end}; try {end // 100}"
        )
    if t.lr_wsd_decay_iters < 0:
        yield f"lr_wsd_decay_iters={t.lr_wsd_decay_iters} must not be negative; try {max(end // 10, 1)}"
    if t.lr_decay_style == "WSD":
        if t.lr_wsd_decay_iters == 0:
            yield f"lr_decay_style=WSD needs lr_wsd_decay_iters; try --lr-wsd-decay-iters {max(end // 10, 1)}"
        if t.lr_warmup_iters + t.lr_wsd_decay_iters > end:
            yield (
                f"lr_warmup_iters+lr_wsd_decay_iters={t.lr_warmup_iters + t.lr_wsd_decay_iters} must be at "
                "most "
                f"{end_name}={end}; shorten one of them"
            )
    elif t.lr_wsd_decay_iters > 0:
        yield (
            f"lr_wsd_decay_iters={t.lr_wsd_decay_iters} needs lr_decay_style=WSD, not {t.lr_decay_style}; "
            "set --lr-decay-style WSD"
        )


def _step_problems(t: TrainConfig) -> Iterator[str]:
    not_negative = "seed eval_interval eval_iters weight_decay clip_grad exit_interval exit_duration_in_mins"
    for name in not_negative.split():
        if getattr(t, name) < 0:
            yield f"{name}={getattr(t, name)} must not be negative; set 0 or more"
    if t.seed >= 2**63:
        yield f"seed={t.seed} must be below 2**63; try {t.seed % 10**6}"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(t, name) < 1:
            yield (
                f"{name}={getattr(t, name)} must be from 0 to below 1; try {0.9 if name[-1] == '1' else 0.95}"
            )
    if t.adam_eps <= 0:
        yield f"adam_eps={t.adam_eps} must be positive; try 1e-8"
    if t.eval_interval > 0 and t.eval_iters == 0:
        yield f"eval_interval={t.eval_interval} needs eval_iters > 0; try --eval-iters 10"
    if t.loss_spike_factor != 0 and t.loss_spike_factor <= 1:
        yield f"loss_spike_factor={t.loss_spike_factor} must be 0 (off) or above 1; try 1.5"
    if t.loss_spike_window < 1:
        yield f"loss_spike_window={t.loss_spike_window} must be at least 1; try 100"
    if not 0 < t.loss_spike_retry_lr_factor <= 1:
        yield (
            f"loss_spike_retry_lr_factor={t.loss_spike_retry_lr_factor} must be above 0 and at most 1; try "
            "0.5"
        )


def _checkpoint_problems(c: CheckpointConfig) -> Iterator[str]:
    for name in ("save_interval", "keep_last_n"):
        if getattr(c, name) < 0:
            yield f"{name}={getattr(c, name)} must not be negative; set 0 or more"
    for name in ("save_interval", "async_save", "keep_last_n"):
        if getattr(c, name) and c.save is None:
            yield f"{name}={getattr(c, name)} needs a folder to save in; set --save FOLDER"
    for name in ("finetune", "no_load_optim", "no_load_rng"):
        if getattr(c, name) and c.load is None:
            yield f"{name}=True needs a checkpoint to load; set --load FOLDER"
    if c.finetune and c.pretrained_checkpoint:
        yield (
            f"finetune=True and pretrained_checkpoint={c.pretrained_checkpoint} both say which weights to start "
            "from; drop --finetune"
        )


def _logging_problems(g: LoggingConfig) -> Iterator[str]:
    if g.log_interval < 1:
        yield f"log_interval={g.log_interval} must be at least 1; set --log-interval 1"
    if g.log_interval_seconds < 0:
        yield f"log_interval_seconds={g.log_interval_seconds} must not be negative; 0 prints every progress line"
    if g.peak_tflops < 0:
        yield f"peak_tflops={g.peak_tflops} must not be negative; 0 means unknown"
    if g.profile and not 0 <= g.profile_step_start < g.profile_step_end:
        yield (
            f"profile_step_start={g.profile_step_start} must be from 0 to below "
            f"profile_step_end={g.profile_step_end}; try {g.profile_step_start} and "
            f"{g.profile_step_start + 2}"
        )
