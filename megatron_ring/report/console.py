"""The summary that the console shows of a run."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ring.report.facts import quantities, rows, run_facts, shown
from megatron_ring.report.read import Run, read_run
from megatron_ring.report.topics import headline

_FACTS = ("Size", "Layout", "Processes", "Steps", "Tokens", "Wall time", "Resumed")
"""Facts shown on the console; the report has more."""
_EVALS = ("perplexity", "accuracy")
"""Quantities that only validations have."""


def summary_table(run: Run) -> Table:
    """First, best and last value of the headline quantities."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(Text(run.name, style="bold"), style="dim", no_wrap=True)
    for head in ("first", "best", "last"):
        table.add_column(head, justify="right", no_wrap=True)
    names = [name for name in headline(quantities(run)) if name != "lr"]
    for row in rows(run, [*names, *_EVALS]):
        best = "" if row.best is None else f"{shown(row.name, row.best)} @ {row.best_step}"
        table.add_row(Text(row.label), shown(row.name, row.first), best, shown(row.name, row.last))
    return table


def print_summary(
    run_dir: str | Path,
    *,
    files: Sequence[tuple[str, str | Path]] = (),
    next_commands: Sequence[tuple[str, str]] = (),
    console: Console | None = None,
) -> None:
    """Print a run's results: quantities, facts, sample text, where its files are, what to run next.

    Plain text unless stdout is a terminal. Commands stay on one line each, so that they can be copied.

    Example: ``print_summary("runs/tiny", files=[("report", "runs/tiny/report.html")],
    next_commands=[("compare two runs", "ring report runs/a runs/b")])``
    """
    console = console or Console(highlight=False)
    run = read_run(run_dir)
    console.print(summary_table(run))
    rest = len(rows(run)) - summary_table(run).row_count
    if rest:
        console.print(f"  {rest} more are in the report", style="dim")
    _pairs(console, [(name, text) for name, text in run_facts(run).items() if name in _FACTS])
    if run.sample:
        console.print(Text("\nwhat it writes", style="bold"))
        console.print(Text(run.sample.strip()), soft_wrap=True)
    if files:
        console.print(Text("\nfiles", style="bold"))
        _pairs(console, [(name, str(path)) for name, path in files])
    if next_commands:
        console.print(Text("\nnext", style="bold"))
        for purpose, command in next_commands:
            console.print(Text(f"  # {purpose}", style="dim"), soft_wrap=True)
            console.print(Text(f"  {command}", style="cyan"), soft_wrap=True)


def _pairs(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        console.print(Text.assemble((f"  {name:<{width}}  ", "dim"), text), soft_wrap=True)
