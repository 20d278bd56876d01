"""Batches, the learning rate's schedule, and what is saved, loaded and logged."""

from collections.abc import Iterator

from megatron_ring.config.layout import data_parallel_size
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.rules.words import multiples_near
from megatron_ring.config.run import RunConfig
from megatron_ring.config.train import TrainConfig


def samples(config: RunConfig, world_size: int) -> Iterator[str]:
    """Samples that the model can read and tp can split."""
    t, p = config.train, config.parallel
    if t.seq_length > config.model.max_position_embeddings:
        yield (
            f"seq_length={t.seq_length} must be at most max_position_embeddings="
            f"{config.model.max_position_embeddings}; shorten it or set --max-position-embeddings"
        )
    capacity, tp = t.micro_batch_size * t.seq_length, p.tensor_model_parallel_size
    if p.sequence_parallel and capacity % tp != 0:
        yield (
            f"micro_batch_size*seq_length={t.micro_batch_size}*{t.seq_length}={capacity} must be a multiple "
            f"of tensor_model_parallel_size={tp}; try seq_length={multiples_near(t.seq_length, tp)}"
        )


def number_of_steps(config: RunConfig, world_size: int) -> Iterator[str]:
    """A stage whose data does not say how many steps there are must be told."""
    if config.train.train_iters == 0:
        yield "train_iters=0 must be at least 1; set --train-iters"


def batches(config: RunConfig, world_size: int) -> Iterator[str]:
    """Global batches, those of the warm-up included, that divide into microbatches."""
    t, p = config.train, config.parallel
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
    start, increment, ramp_samples = t.rampup_batch_size
    shown = f"rampup_batch_size={start} {increment} {ramp_samples}"
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


def schedule(config: RunConfig, world_size: int) -> Iterator[str]:
    """Warm-up and decay that fit into the run's steps."""
    yield from schedule_problems(config.train)


def schedule_problems(t: TrainConfig) -> Iterator[str]:
    """What is wrong with the learning rate's schedule; a stage that derives its steps asks once it knows them."""
    if t.min_lr > t.lr:
        yield f"min_lr={t.min_lr} must be from 0 to lr={t.lr}; try {t.lr / 10:g}"
    end_name = "train_iters" if t.lr_decay_iters is None else "lr_decay_iters"
    end = t.train_iters if t.lr_decay_iters is None else t.lr_decay_iters
    if end == 0:
        return
    if t.lr_warmup_iters >= end:
        yield (
            f"lr_warmup_iters={t.lr_warmup_iters} must be from 0 to below {end_name}={end}; try {end // 100}"
        )
    if t.lr_decay_style == "WSD":
        if t.lr_wsd_decay_iters == 0:
            yield f"lr_decay_style=WSD needs lr_wsd_decay_iters; try --lr-wsd-decay-iters {max(end // 10, 1)}"
        if t.lr_warmup_iters + t.lr_wsd_decay_iters > end:
            yield (
                f"lr_warmup_iters+lr_wsd_decay_iters={t.lr_warmup_iters + t.lr_wsd_decay_iters} must be at "
                f"most {end_name}={end}; shorten one of them"
            )
    elif t.lr_wsd_decay_iters > 0:
        yield (
            f"lr_wsd_decay_iters={t.lr_wsd_decay_iters} needs lr_decay_style=WSD, not {t.lr_decay_style}; "
            "set --lr-decay-style WSD"
        )


def validation(config: RunConfig, world_size: int) -> Iterator[str]:
    """A validation that reads something."""
    t = config.train
    if t.eval_interval > 0 and t.eval_iters == 0:
        yield f"eval_interval={t.eval_interval} needs eval_iters > 0; try --eval-iters 10"


def checkpoints(config: RunConfig, world_size: int) -> Iterator[str]:
    """Folders for what is to be saved or loaded, and one origin of the first weights."""
    c = config.checkpoint
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


def profiling(config: RunConfig, world_size: int) -> Iterator[str]:
    """At least one step to profile."""
    g = config.logging
    if g.profile and g.profile_step_start >= g.profile_step_end:
        yield (
            f"profile_step_start={g.profile_step_start} must be from 0 to below "
            f"profile_step_end={g.profile_step_end}; try {g.profile_step_start} and "
            f"{g.profile_step_start + 2}"
        )
