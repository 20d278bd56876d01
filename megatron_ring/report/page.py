"""The report of a run, or of several side by side: one self-contained HTML file, and loss.png."""

import base64
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from megatron_ring.config.dump import dump_toml
from megatron_ring.durable import require_replaceable, write_durably
from megatron_ring.errors import DataError
from megatron_ring.observe.progress import duration
from megatron_ring.report import picture
from megatron_ring.report.facts import differences, label, phase_seconds, quantities, rows, run_facts, shown
from megatron_ring.report.read import Run, read_run
from megatron_ring.report.topics import SPEED, by_topic

_CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #6b7785; --line: #e6e9ed; --accent: #0b63a5; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 14px; }
.note { color: var(--muted); font-size: 13px; margin: 12px 0 0; }
.sub { color: var(--muted); margin: 0 0 24px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
  margin: 0 0 18px; overflow-x: auto; }
.tiles { display: grid; gap: 14px; margin: 0 0 18px;
  grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.tile b { display: block; font-size: 25px; font-weight: 650; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 13px; }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: 500; }
th, td { padding: 7px 18px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { font-size: 12.5px; }
.n { text-align: right; white-space: nowrap; }
.n small { color: var(--muted); margin-left: 6px; }
h3 { font-size: 14px; margin: 16px 0 10px; }
.bar { display: flex; height: 26px; border-radius: 6px; overflow: hidden; margin-bottom: 12px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 14px; font-variant-numeric: tabular-nums; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; }
.key span span { color: var(--muted); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; font-weight: 600; font-size: 17px; }
summary small { color: var(--muted); font-size: 13px; font-weight: 400; margin-left: 14px; }
details > *:nth-child(2) { margin-top: 14px; }
.panels { margin-top: 22px; }
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""


def render_report(run_dir: str | Path, out_html: str | Path) -> Path:
    """Write the report of one run to ``out_html`` and its curves to ``loss.png`` beside it.

    Returns the page's path. Raises DataError for missing or empty metrics, or a place that cannot be written.
    """
    run = read_run(run_dir)
    parts = [
        _head(run.name, _subtitle(run)),
        _tiles(run),
        _curves([run]),
        *_topic_cards([run]),
        _sample_card(run, "What the trained model writes"),
        _responses_card(run),
        _facts_card(run),
        _config_card(run),
    ]
    return _write(out_html, run.name, parts, [run])


def render_comparison(run_dirs: Sequence[str | Path], out_html: str | Path) -> Path:
    """Write one report of several runs and its ``loss.png``. Returns and raises as :func:`render_report`."""
    runs = _told_apart([read_run(run_dir) for run_dir in run_dirs])
    title = " and ".join(_names(runs)) if len(runs) == 2 else f"{len(runs)} runs"
    facts = [run_facts(run) for run in runs]
    labels = list(dict.fromkeys(name for of_run in facts for name in of_run))
    parts = [
        _head(title, "Side by side: same axes, one colour a run"),
        _curves(runs),
        _by_run("Settings that differ", runs, _escaped(differences(runs))),
        *_topic_cards(runs),
        _by_run(
            "Runs", runs, _escaped({name: [of_run.get(name, "") for of_run in facts] for name in labels})
        ),
        *(_sample_card(run, f"What {run.name} writes") for run in runs),
    ]
    return _write(out_html, title, parts, runs)


def _write(out_html: str | Path, title: str, parts: Sequence[str], runs: Sequence[Run]) -> Path:
    """Write page and picture, each in one step: a reader never sees half a file."""
    out = Path(out_html)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )
    image = out.with_name("loss.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        require_replaceable(out)
        write_durably(image, [picture.to_png(picture.draw(runs, title))])
        write_durably(out, page)
    except OSError as error:
        raise DataError(
            f"report {out}: {error.strerror}; name a file that can be written with --out"
        ) from None
    return out


def _head(title: str, subtitle: str) -> str:
    return f'<h1>{escape(title)}</h1>\n<p class="sub">{escape(subtitle)}</p>'


def _subtitle(run: Run) -> str:
    facts = run_facts(run)
    words = [facts[name] for name in ("Size", "Layout") if name in facts]
    return " \u00b7 ".join(
        [*words, f"{facts['Steps']} steps", f"{facts['Tokens']} tokens", facts["Wall time"]]
    )


def _tiles(run: Run) -> str:
    tiles: list[tuple[str, str]] = []
    main = picture.main_quantity([run])
    if (evals := run.eval_series(main)).values:
        text = f"validation {label(main)}, from {shown(main, evals.values[0])}"
        tiles.append((shown(main, evals.values[-1]), text))
    if (train := run.series(main)).values:
        text = f"training {label(main)}, from {shown(main, train.values[0])}"
        tiles.append((shown(main, picture.smooth(train.values)[-1]), text))
    if speeds := sorted(run.series("tokens_per_second").values):
        tiles.append((shown("tokens_per_second", speeds[len(speeds) // 2]), "tokens per second, median"))
    if mfu := sorted(run.series("mfu").values):
        tiles.append((shown("mfu", mfu[len(mfu) // 2]), "model FLOP utilisation, median"))
    tiles.append((duration(run.wall_seconds), "wall time"))
    inside = "".join(
        f'<div class="tile"><b>{escape(b)}</b><span>{escape(text)}</span></div>' for b, text in tiles
    )
    return f'<div class="tiles">{inside}</div>'


def _curves(runs: Sequence[Run]) -> str:
    shown_here = [picture.main_quantity(runs), *picture.small_quantities(runs)]
    image = _image(picture.draw(runs, ""), f"{', '.join(map(label, shown_here))} by step")
    if all(len(run.train) < picture.SMOOTH_FROM for run in runs):
        return _card("", image)
    note = "Lines are running means over a fiftieth of the run"
    note += "; the pale band is every step." if len(runs) == 1 else "."
    return _card("", f'{image}<p class="note">{note}</p>')


def _topic_cards(runs: Sequence[Run]) -> list[str]:
    """A card for each topic, folded but the first: quantities first, best and last, and a panel for each that changes."""
    topics = by_topic(name for run in runs for name in quantities(run))
    drawn = {picture.main_quantity(runs), *picture.small_quantities(runs)}
    cards: list[str] = []
    for topic, names in topics.items():
        table = (
            _rows_table(runs[0], names) if len(runs) == 1 else _run_table(runs, _last_and_best(runs, names))
        )
        figure = picture.draw_panels(runs, [name for name in names if name not in drawn])
        image = "" if figure is None else f'<div class="panels">{_image(figure, f"{topic} by step")}</div>'
        phases = _phases(runs[0]) if topic == SPEED and len(runs) == 1 else ""
        if table:
            cards.append(_folded(topic, _digest(runs, names), f"{phases}{table}{image}", is_open=not cards))
    return cards


def _digest(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Last values of a topic's first three quantities, beside its title; empty for several runs."""
    if len(runs) > 1:
        return ""
    last = [(name, values[-1]) for name in names if (values := runs[0].series(name).values)]
    return ", ".join(f"{label(name)} {shown(name, value)}" for name, value in last[:3])


def _folded(title: str, digest: str, inside: str, *, is_open: bool = False) -> str:
    """A section that can be folded; ``inside`` is HTML."""
    opened = " open" if is_open else ""
    head = f"<summary>{escape(title)}<small>{escape(digest)}</small></summary>"
    return f'<section class="card"><details{opened}>{head}{inside}</details></section>'


def _image(figure: Figure, alternative: str) -> str:
    data = base64.b64encode(picture.to_svg(figure)).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/svg+xml;base64,{data}">'


def _rows_table(run: Run, names: Sequence[str]) -> str:
    body = "".join(
        f'<tr><th title="{escape(row.name)}">{escape(row.label)}</th>{_cell(shown(row.name, row.first))}'
        f"{_cell(_best(row.name, row.best, row.best_step))}{_cell(shown(row.name, row.last))}</tr>"
        for row in rows(run, names)
    )
    head = "".join(f'<th class="n">{name}</th>' for name in ("first", "best", "last"))
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>" if body else ""


def _card(title: str, inside: str) -> str:
    """A section of the page; ``inside`` is HTML."""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f'<section class="card">{head}{inside}</section>'


def _cell(inside: str) -> str:
    return f'<td class="n">{inside}</td>'


def _best(name: str, best: float | None, step: int | None) -> str:
    return "\u2013" if best is None else f"{shown(name, best)}<small>step {step:,}</small>"


def _facts_card(run: Run) -> str:
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in run_facts(run).items()
    )
    return _card("The run", f"<table><tbody>{body}</tbody></table>")


def _phases(run: Run) -> str:
    phases = phase_seconds(run)
    if not phases:
        return ""
    total = sum(phases.values())
    palette = picture.COLOURS
    colours = {name: palette[index % len(palette)] for index, name in enumerate(phases)} | {
        "other": "#c9d0d7"
    }
    bar = "".join(
        f'<div style="width:{100 * spent / total:.2f}%;background:{colours[name]}"></div>'
        for name, spent in phases.items()
    )
    key = "".join(
        f'<span><i style="background:{colours[name]}"></i>{escape(name.replace("_", " "))} '
        f"<span>{1000 * spent:,.0f} ms, {100 * spent / total:.0f}%</span></span>"
        for name, spent in phases.items()
    )
    title = f"Where the {1000 * total:,.0f} ms of a step go"
    return f'<h3>{title}</h3><div class="bar">{bar}</div><div class="key">{key}</div>'


def _sample_card(run: Run, title: str) -> str:
    if not run.sample:
        return ""
    return _card(title, f"<pre>{escape(run.sample.strip())}</pre>")


def _responses_card(run: Run) -> str:
    if not run.responses:
        return ""
    body = "".join(
        f"<tr><td>{escape(row['prompt'])}</td><td><pre>{escape(row['response'])}</pre></td>"
        f"{_cell(format(row['score'], 'g'))}<td>{escape(row['status'])}</td></tr>"
        for row in run.responses
    )
    head = '<th>problem</th><th>response</th><th class="n">reward</th><th>status</th>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return _card(f"Best and worst responses of step {run.responses[0]['step']:,}", table)


def _config_card(run: Run) -> str:
    if run.config is None:
        return ""
    return _folded("All settings", "", f"<pre>{escape(dump_toml(run.config))}</pre>")


def _last_and_best(runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[str]]:
    tables = [{row.label: row for row in rows(run, names)} for run in runs]
    cells: dict[str, list[str]] = {}
    for name in dict.fromkeys(text for table in tables for text in table):
        cells[name] = []
        for table in tables:
            row = table.get(name)
            best = (
                "" if row is None or row.best is None else f"<small>best {shown(row.name, row.best)}</small>"
            )
            cells[name].append("" if row is None else f"{shown(row.name, row.last)}{best}")
    return cells


def _by_run(title: str, runs: Sequence[Run], cells: dict[str, list[str]]) -> str:
    """A card with a column per run; ``cells`` hold HTML."""
    return _card(title, _run_table(runs, cells)) if cells else ""


def _run_table(runs: Sequence[Run], cells: dict[str, list[str]]) -> str:
    if not cells:
        return ""
    head = "".join(
        f'<th class="n" style="color:{picture.COLOURS[i % len(picture.COLOURS)]}">{escape(name)}</th>'
        for i, name in enumerate(_names(runs))
    )
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(_cell(cell) for cell in row) + "</tr>"
        for name, row in cells.items()
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _escaped(cells: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: [escape(text) for text in texts] for name, texts in cells.items()}


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs; those that share a name are named by their path."""
    names = _names(runs)
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]
