"""Facts and figures of a run, for the page and the console."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_ring.config.dump import flat
from megatron_ring.config.layout import data_parallel_size
from megatron_ring.config.model_stats import count_parameters
from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import settings
from megatron_ring.observe.progress import count, duration
from megatron_ring.report.read import Run, Series
from megatron_ring.report.topics import headline

# names that are not a quantity of the run's own
_BOOKKEEPING = {"kind", "step", "tokens", "seconds", "wall_seconds"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One quantity from start to end.

    ``best`` is None if neither high nor low is better.

    Example: ``Row(label="validation loss", name="loss", first=8.3, best=3.1, best_step=250, last=3.2)``
    """

    label: str
    name: str
    first: float
    best: float | None
    best_step: int | None
    last: float


def quantities(run: Run) -> list[str]:
    """Names of what was logged per step or validation, headline quantities first, without the phases."""
    names = dict.fromkeys(name for record in (*run.train, *run.evals) for name in record)
    own = [name for name in names if name not in _BOOKKEEPING and not name.startswith("seconds_")]
    return list(dict.fromkeys([*headline(own), *own]))


def rows(run: Run, names: Iterable[str] | None = None) -> list[Row]:
    """First, best and last of every quantity, or of ``names``; validation directly after training."""
    found: list[Row] = []
    for name in quantities(run) if names is None else names:
        found += _row(label(name), name, run.series(name))
        found += _row(f"validation {label(name)}", name, run.eval_series(name))
    return found


def label(name: str) -> str:
    """A metric as people say it, below its topic's title.

    Example: ``label("c3po/responses_cut")`` is ``"responses cut"``, ``label("status/wrong")`` ``"status: wrong"``.
    """
    said = {
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "loss_tokens": "trained tokens per step",
        "mfu": "MFU",
    }
    bare = name.removeprefix("c3po/").removeprefix("packing/").replace("status/", "status: ")
    return said.get(name, bare.replace("_", " "))


def shown(name: str, value: float) -> str:
    """A value with the digits that matter for its quantity."""
    if name == "mfu":
        return f"{100 * value:.1f}%"
    if name == "tokens_per_second":
        return count(value)
    if name == "lr":
        return f"{value:.2e}" if value else "0"
    if value == int(value) and (value == 0 or abs(value) >= 10):
        return f"{value:,.0f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def phase_seconds(run: Run) -> dict[str, float]:
    """Mean seconds per step of each phase, longest first, then ``other``: the time in no phase. Empty without phases."""
    totals: dict[str, float] = {}
    for record in run.train:
        for name, value in record.items():
            if name.startswith("seconds_") and value is not None:
                totals[name.removeprefix("seconds_")] = totals.get(name.removeprefix("seconds_"), 0.0) + value
    if not totals:
        return {}
    steps = len(run.train)
    means = {name: total / steps for name, total in sorted(totals.items(), key=lambda item: -item[1])}
    first = run.train[0]
    elapsed = run.train[-1]["wall_seconds"] - first["wall_seconds"] + first["seconds"]
    other = elapsed / steps - sum(means.values())
    return {**means, "other": other} if other > 0 else means


def run_facts(run: Run) -> dict[str, str]:
    """Label -> text: size, layout, batch, steps, duration."""
    facts: dict[str, str] = {}
    if run.config is not None:
        facts |= _config_facts(run.config, run.world_size)
    else:
        facts["Processes"] = str(run.world_size)
    total = "" if run.config is None else f" of {run.config.train.train_iters:,}"
    facts["Steps"] = f"{run.last_step:,}{total}" + ("" if run.ended else ", still running or stopped")
    facts["Tokens"] = count(sum(record["tokens"] for record in run.train))
    facts["Wall time"] = duration(run.wall_seconds)
    resumed = [start["step"] for start in run.starts if start["step"] > 0]
    if resumed:
        facts["Resumed"] = "after step " + ", ".join(f"{step:,}" for step in resumed)
    if run.starts and "time" in run.starts[0]:
        facts["Started"] = run.starts[0]["time"].replace("T", " ").replace("+00:00", " UTC")
    return facts


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """Setting -> its value in each run, for the settings in which the runs' configs differ."""
    configs = [flat(run.config) for run in runs if run.config is not None]
    if len(configs) < len(runs):
        return {}
    names = [name for name in settings() if len({str(config[name]) for config in configs}) > 1]
    return {name: [_word(config[name]) for config in configs] for name in names}


def _row(text: str, name: str, series: Series) -> list[Row]:
    if not series.values:
        return []
    better = _better(name)
    best = None if better is None else better(series.values)
    best_step = None if best is None else series.steps[series.values.index(best)]
    first, last = series.values[0], series.values[-1]
    return [Row(label=text, name=name, first=first, best=best, best_step=best_step, last=last)]


def _better(name: str) -> Any:
    """min or max, whichever is better; None when neither is."""
    if name.endswith(("loss", "perplexity")):
        return min
    if name.endswith(("reward", "accuracy", "tokens_per_second", "mfu")):
        return max
    return None


def _config_facts(config: RunConfig, world_size: int) -> dict[str, str]:
    model, parallel, train = config.model, config.parallel, config.train
    size = count_parameters(model)
    active = f", {count(size.active)} active per token" if size.active < size.total else ""
    shape = f"{model.num_layers} layers, width {model.hidden_size:,}, vocabulary {model.vocab_size:,}"
    layout = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.num_virtual_stages_per_pipeline_rank,
        "ep": parallel.expert_model_parallel_size,
        "etp": parallel.expert_tensor_parallel_size,
        "dp": data_parallel_size(parallel, world_size),
    }
    split = ", ".join(f"{name} {value}" for name, value in layout.items() if value > 1)
    processes = f"{world_size} process" + ("es" if world_size > 1 else "")
    facts = {"Size": f"{count(size.total)} parameters{active}", "Shape": shape}
    if model.is_moe:
        facts["Experts"] = f"{model.num_experts}, {model.moe_router_topk} per token"
    facts["Layout"] = processes + (f": {split}" if split else "")
    facts["Precision"] = "bf16, fp32 main parameters" if parallel.bf16 else "fp32"
    facts["Batch"] = f"{train.global_batch_size:,} samples of {train.seq_length:,} tokens"
    return facts


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(str(item) for item in value) or "empty"
    return "none" if value is None else str(value)
