"""The curves of one or several runs. There is no legend: each line is named at its end."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_ring.errors import DataError
from megatron_ring.report.facts import label, quantities
from megatron_ring.report.read import Run, Series
from megatron_ring.report.topics import headline

INK, MUTED, GRID, PAPER = "#1f2933", "#6b7785", "#e6e9ed", "#ffffff"
# told apart also by readers who are colour-blind (Okabe and Ito, darkened for white paper)
COLOURS = ("#0b63a5", "#c8501e", "#0a8a63", "#8b3f86", "#a87a00", "#3f8fc4", "#5c6670", "#b3264a")
TRAIN_COLOUR, EVAL_COLOUR = COLOURS[0], COLOURS[1]
# values from which on a line is smoothed
SMOOTH_FROM = 100
# points a line is thinned to: more than a page can show
_POINTS = 1000
# small panels in a row
_COLUMNS = 3
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#b8c0c8",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    # the same run gives the same bytes
    "svg.hashsalt": "megatron_ring",
}


@dataclass(frozen=True, slots=True)
class _Line:
    """A line that was drawn, to be named at its end."""

    text: str
    colour: str
    y: float


def draw(runs: Sequence[Run], title: str) -> Figure:
    """The main quantity and its validation large, the other headline quantities small below."""
    with matplotlib.rc_context(_STYLE):
        main = main_quantity(runs)
        small = small_quantities(runs)
        rows = -(-len(small) // _COLUMNS)
        lines = _main_lines(runs, main)
        # inches: what is above the panels, the large one, each row of small ones, what is below
        above, large, low, below = 0.75 if title else 0.3, 3.1, 1.5, 0.5
        gap = 0.65
        height = above + large + rows * (gap + low) + below
        figure = Figure(figsize=(10, height), facecolor=PAPER)
        left, right = 0.06, 0.98 - max((_width(figure, line.text) for line in lines), default=0.0)
        figure.text(left, 1 - 0.36 / height, title, fontsize=14, fontweight="bold")
        bottom = height - above - large
        axes = figure.add_axes((left, bottom / height, right - left, large / height))
        _main_panel(axes, runs, main, lines)
        if small:
            grid = figure.add_gridspec(
                rows, min(len(small), _COLUMNS), hspace=gap / low, wspace=0.24, left=left, right=0.98,
                top=(bottom - gap) / height, bottom=below / height,
            )  # fmt: skip
            for index, name in enumerate(small):
                _panel(figure.add_subplot(grid[index // _COLUMNS, index % _COLUMNS]), runs, name)
        return figure


def draw_panels(runs: Sequence[Run], names: Sequence[str]) -> Figure | None:
    """A small panel for each quantity of ``names`` that changes; None when none does."""
    names = [name for name in names if any(len(set(run.series(name).values)) > 1 for run in runs)]
    if not names:
        return None
    with matplotlib.rc_context(_STYLE):
        rows = -(-len(names) // _COLUMNS)
        height = 2.2 * rows
        figure = Figure(figsize=(10, height), facecolor=PAPER)
        grid = figure.add_gridspec(
            rows, _COLUMNS, hspace=0.55, wspace=0.24, left=0.045, right=0.985,
            top=1 - 0.28 / height, bottom=0.42 / height,
        )  # fmt: skip
        for index, name in enumerate(names):
            _panel(figure.add_subplot(grid[index // _COLUMNS, index % _COLUMNS]), runs, name)
        return figure


def to_png(figure: Figure) -> bytes:
    """``figure`` as a picture of 2000 pixels' width."""
    with matplotlib.rc_context(_STYLE):
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=200)
        return image.getvalue()


def to_svg(figure: Figure) -> bytes:
    """``figure`` as SVG, text as outlines: the same on every machine."""
    with matplotlib.rc_context(_STYLE):
        text = io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        return text.getvalue()


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window around each value, a fiftieth of the run wide; under 100 values, the values.

    The window reaches as far back as ahead, so that a falling curve is not drawn late, except at the end.
    """
    if len(values) < SMOOTH_FROM:
        return list(values)
    half = len(values) // 100
    sums = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    here = np.arange(len(values))
    reach = np.minimum(here, half)
    first, after = here - reach, np.minimum(here + reach + 1, len(values))
    return ((sums[after] - sums[first]) / (after - first)).tolist()


def thin(series: Series, points: int = _POINTS) -> tuple[Series, Series]:
    """(lowest, highest) value of each of at most ``points`` stretches, at the stretch's last step.

    Example: steps 1 to 4, values 5, 1, 2, 8, two points: ``([2, 4], [1, 2])`` and ``([2, 4], [5, 8])``.
    """
    stretches = [part for part in np.array_split(np.arange(len(series.steps)), points) if part.size]
    steps = [series.steps[part[-1]] for part in stretches]
    values = np.asarray(series.values)
    low = [float(values[part].min()) for part in stretches]
    high = [float(values[part].max()) for part in stretches]
    return Series(steps=steps, values=low), Series(steps=steps, values=high)


def main_quantity(runs: Sequence[Run]) -> str:
    """The quantity drawn large: the reward if there is one, else the loss, else the first quantity.

    Raises DataError where no step of any run has a finite quantity.
    """
    names = [name for run in runs for name in quantities(run) if run.series(name).values]
    if not names:
        folders = ", ".join(str(run.folder) for run in runs)
        raise DataError(f"metrics of {folders}: no step has a finite quantity to draw; name another run")
    return next(name for name in ("reward", "loss", *names) if name in names)


def small_quantities(runs: Sequence[Run]) -> list[str]:
    """The headline quantities that are drawn small."""
    names = headline(name for run in runs for name in quantities(run) if run.series(name).values)
    return [name for name in names if name != main_quantity(runs)]


def _main_lines(runs: Sequence[Run], name: str) -> list[_Line]:
    """Names for the lines' ends: both lines of one run, or one name for each of several runs."""
    lines: list[_Line] = []
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)]
        train, evals = run.series(name), run.eval_series(name)
        if train.values:
            end = smooth(train.values)[-1]
            text = "training" if len(runs) == 1 else _short(run.name)
            lines.append(_Line(f"{text} {_three(end)}", colour, end))
        if evals.values and (len(runs) == 1 or not train.values):
            text = "validation" if len(runs) == 1 else _short(run.name)
            end = evals.values[-1]
            lines.append(_Line(f"{text} {_three(end)}", EVAL_COLOUR if len(runs) == 1 else colour, end))
    return lines


def _three(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}\u2026"


def _main_panel(axes: Axes, runs: Sequence[Run], name: str, lines: Sequence[_Line]) -> None:
    several = len(runs) > 1
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)]
        train, evals = run.series(name), run.eval_series(name)
        if train.values:
            _curve(axes, train, colour, width=1.6, faint=not several)
        if evals.values:
            style = (
                {"color": colour, "linewidth": 1.2, "linestyle": (0, (2, 2))}
                if several
                else {"linewidth": 1.8}
            )
            marker = "o" if len(evals.steps) <= 40 else None
            axes.plot(
                evals.steps,
                evals.values,
                **{"color": EVAL_COLOUR, **style},
                marker=marker,
                markersize=3,
                zorder=4,
            )
    dashed = " (dashed: validation)" if several and any(run.eval_series(name).values for run in runs) else ""
    _finish(axes, _title(name) + dashed, runs, ticks=8)
    _name_ends(axes, lines)


def _panel(axes: Axes, runs: Sequence[Run], name: str) -> None:
    everything: list[float] = []
    for index, run in enumerate(runs):
        series = run.series(name)
        if series.values:
            everything += series.values
            _curve(
                axes,
                series,
                COLOURS[index % len(COLOURS)],
                width=1.3,
                faint=len(runs) == 1,
                exact=name == "lr",
            )
    low, high = min(everything), max(everything)
    if name == "grad_norm" and low > 0 and high / low > 50:
        axes.set_yscale("log")
        # plain digits: a power of ten would be set in a mathematical font, which may not be installed
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda *_: "")
    elif name in ("lr", "tokens_per_second", "loss_tokens", "mfu", "grad_norm", "response_length"):
        axes.set_ylim(0, (high or 1.0) * 1.08)
    if name in ("tokens_per_second", "loss_tokens"):
        axes.yaxis.set_major_formatter(lambda value, _: _tick(value, high))
    if name == "lr":
        axes.yaxis.set_major_formatter(lambda value, _: _scientific(value))
    _finish(axes, _title(name), runs, ticks=4)


def _title(name: str) -> str:
    text = label(name)
    return text[0].upper() + text[1:]


def _tick(value: float, high: float) -> str:
    """A tick in the unit that suits the axis' end. Example: ``_tick(5000, high=20000)`` is ``"5k"``."""
    size, unit = next(((s, u) for s, u in ((1e6, "M"), (1e4, "k")) if high >= s), (1.0, ""))
    size = 1e3 if unit == "k" else size
    return f"{value / size:g}{unit}" if value else "0"


def _scientific(value: float) -> str:
    """A small number in few characters. Example: ``_scientific(7.5e-4)`` is ``"7.5e-4"``."""
    if value == 0:
        return "0"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _curve(
    axes: Axes, series: Series, colour: str, *, width: float, faint: bool, exact: bool = False
) -> None:
    """Draw a smoothed line, over the faint band of its values; ``exact`` draws the values themselves."""
    smoothed = series if exact else Series(steps=series.steps, values=smooth(series.values))
    if faint and smoothed.values != series.values:
        low, high = thin(series)
        axes.fill_between(low.steps, low.values, high.values, color=colour, alpha=0.18, linewidth=0.6)
    line = smoothed if len(series.steps) <= _POINTS else thin(smoothed)[0]
    marker = "o" if len(line.steps) == 1 else None
    axes.plot(line.steps, line.values, color=colour, linewidth=width, marker=marker, markersize=4, zorder=3)


def _finish(axes: Axes, title: str, runs: Sequence[Run], *, ticks: int) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=8)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(0, max(run.last_step for run in runs) * 1.005)
    axes.margins(y=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
    last = max(run.last_step for run in runs)
    axes.xaxis.set_major_formatter(lambda value, _: _tick(value, last))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step", fontsize=8, labelpad=2)


_NAME: dict[str, Any] = {"fontsize": 9, "fontweight": "bold"}


def _width(figure: Figure, name: str) -> float:
    """How much of the figure's width ``name`` takes at a line's end."""
    probe = figure.text(0, 0, name, **_NAME)
    width = probe.get_window_extent().width / figure.bbox.width
    probe.remove()
    return width


def _name_ends(axes: Axes, lines: Sequence[_Line]) -> None:
    """Write each line's name right of its end, moved apart where ends are close."""
    bottom, top = axes.get_ylim()
    heights = [(line.y - bottom) / (top - bottom) for line in lines]
    for line, height in zip(lines, _apart(heights, gap=0.06), strict=True):
        axes.text(1.01, height, line.text, transform=axes.transAxes, color=line.colour, va="center", **_NAME)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved so that neighbours have ``gap`` between them; each crowd stays centred on its mean.

    Example: ``_apart([0.5, 0.5, 0.9], gap=0.1)`` is ``[0.45, 0.55, 0.9]``.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    crowds: list[list[int]] = []

    def bottom(crowd: list[int]) -> float:
        return sum(heights[i] for i in crowd) / len(crowd) - gap * (len(crowd) - 1) / 2

    for index in order:
        crowds.append([index])
        while len(crowds) > 1 and bottom(crowds[-1]) - bottom(crowds[-2]) < gap * len(crowds[-2]):
            upper = crowds.pop()
            crowds[-1] += upper
    return [
        height
        for _, height in sorted(
            (index, bottom(crowd) + gap * place) for crowd in crowds for place, index in enumerate(crowd)
        )
    ]
