"""``--dry-run``: the plan of a run, without allocating anything or importing torch."""

import io

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_ring.config.dump import format_config
from megatron_ring.config.layout import (
    data_parallel_size,
    expert_data_parallel_size,
    num_microbatches,
    place,
    stage_layers,
)
from megatron_ring.config.model_stats import (
    count_parameters,
    count_rank,
    flops_per_token,
    padded_vocab_size,
    rank_memory,
)
from megatron_ring.config.rl import rollout_concurrency
from megatron_ring.config.rules.model import export_problems
from megatron_ring.config.run import RunConfig
from megatron_ring.config.stages import stage_spec

MAX_RANK_ROWS = 64


def dry_run(config: RunConfig, world_size: int, *, stage: str = "pretrain", styled: bool = False) -> str:
    """The whole config, layout, sizes and memory of a valid ``config`` on ``world_size`` processes, as text.

    ``styled`` adds terminal colours. Memory is weights, gradients and optimizer state; activations are not
    included.
    """
    sink = io.StringIO()
    console = Console(file=sink, width=110, force_terminal=styled, color_system="auto" if styled else None)
    parts = (
        ("Config (* differs from the default)", Text(format_config(config, stage_spec(stage).sections))),
        ("Parameters", _parameters(config)),
        ("Step", _step(config, world_size, stage)),
        ("Pipeline stages", _stages(config, world_size)),
        ("Ranks", _ranks(config, world_size)),
    )
    for title, body in parts:
        console.print(Text(title, style="bold"))
        console.print(body)
        console.print()
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def gib(num_bytes: float) -> str:
    """Bytes as text. Example: ``gib(3 * 2**30)`` is ``"3.00 GiB"``; below 0.1 GiB it counts in MiB."""
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:,.1f} MiB"


def _pairs(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(f"  {name}", value)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=True, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="left" if column in ("stage", "layers") else "right")
    return table


def _parameters(config: RunConfig) -> Table:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    count = count_parameters(model)
    rows = [
        ("total", f"{count.total:,}"),
        ("active per token", f"{count.active:,}"),
        ("vocabulary", f"{model.vocab_size:,} padded to {padded_vocab_size(model, tp):,}"),
        ("experts", f"{model.moe_router_topk} of {model.num_experts} in {model.num_moe_layers} layers"),
    ]
    rows = rows if model.is_moe else rows[:-1]
    problem = next(export_problems(model), None)
    rows.append(
        ("export to Hugging Face", f"as {model.family}" if problem is None else f"refused: {problem}")
    )
    return _pairs(rows)


def _step(config: RunConfig, world_size: int, stage: str) -> Table:
    samples = "rollout" in stage_spec(stage).sections
    rows = [
        ("processes", f"{world_size:,}"),
        ("data parallel", f"{data_parallel_size(config.parallel, world_size):,}"),
        ("expert data parallel", f"{expert_data_parallel_size(config.parallel, world_size):,}"),
        *(_rollout_rows(config) if samples else _batch_rows(config, world_size)),
    ]
    if not config.model.is_moe:
        rows = [row for row in rows if row[0] != "expert data parallel"]
    return _pairs(rows)


def _rollout_rows(config: RunConfig) -> list[tuple[str, str]]:
    rollout, budget = config.rollout, config.budget
    concurrency = rollout_concurrency(rollout)
    rounds = [] if concurrency is None else [("responses decoded at the same time", f"{concurrency:,}")]
    return [
        ("responses per rollout step", f"{rollout.prompts_per_step * rollout.group_size:,}"),
        *rounds,
        ("optimizer steps per rollout step", f"{budget.minibatches_per_step:,}"),
        ("response tokens per optimizer step", f"{budget.token_budget:,} ({budget.token_budget_scope})"),
    ]


def _batch_rows(config: RunConfig, world_size: int) -> list[tuple[str, str]]:
    train = config.train
    tokens = train.global_batch_size * train.seq_length
    flops = flops_per_token(config.model, train.seq_length)
    rows = [
        ("microbatches per rank", f"{num_microbatches(config, world_size):,}"),
        ("tokens per step", f"{tokens:,}"),
        ("tokens in the run", f"{tokens * train.train_iters:,}" if train.train_iters else "by sft_epochs"),
        ("model FLOPs per token", f"{flops:.4g}"),
        ("model FLOPs per step", f"{flops * tokens:.4g}"),
    ]
    if train.rampup_batch_size is not None:
        start, increment, samples = train.rampup_batch_size
        grows = f"{start:,} to {train.global_batch_size:,} samples by {increment:,} over {samples:,} samples"
        rows[2] = ("batch size warm-up", grows)
    return rows


def _stages(config: RunConfig, world_size: int) -> RenderableType:
    model, parallel = config.model, config.parallel
    table = _table(
        "stage", "layers", "parameters/rank", "experts/rank", "weights", "grads", "optimizer", "sum"
    )
    for stage in range(parallel.pipeline_model_parallel_size):
        count = count_rank(model, parallel, stage)
        memory = rank_memory(model, parallel, stage, world_size)
        parts = [_runs(stage_layers(model, parallel, stage))]
        if stage == 0:
            parts.insert(0, "embedding")
        if stage == parallel.pipeline_model_parallel_size - 1:
            parts += ["mtp"] * (model.mtp_num_layers > 0) + ["head"]
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.total)
        table.add_row(
            str(stage), ", ".join(parts), f"{count.total:,}", f"{count.expert:,}", *(gib(s) for s in sizes)
        )
    return table


def _ranks(config: RunConfig, world_size: int) -> RenderableType:
    parallel = config.parallel
    moe = config.model.is_moe
    local = config.model.num_experts // parallel.expert_model_parallel_size if moe else 0
    table = _table("rank", "pp", "dp", "tp", *(("ep", "etp", "edp", "experts") if moe else ()))
    for rank in range(min(world_size, MAX_RANK_ROWS)):
        at = place(parallel, world_size, rank)
        row = [at.rank, at.pp, at.dp, at.tp]
        experts = [str(n) for n in (at.ep, at.etp, at.edp)] + [f"{at.ep * local}-{(at.ep + 1) * local - 1}"]
        table.add_row(*(str(n) for n in row), *(experts if moe else []))
    if world_size <= MAX_RANK_ROWS:
        return table
    return Group(table, Text(f" ... and {world_size - MAX_RANK_ROWS:,} more ranks"))


def _runs(layers: tuple[int, ...]) -> str:
    """Layer numbers with runs joined. Example: ``(0, 1, 4, 5)`` is ``"0-1, 4-5"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
