"""Lines are smoothed without lag, thinned without losing peaks, and named without overlap."""

from itertools import pairwise

import pytest

from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.report.picture import _apart, _scientific, _tick, draw, draw_panels, smooth, thin, to_png
from megatron_ring.report.read import Series, read_run


def test_smoothing_keeps_a_straight_line_where_it_is():
    line = [10.0 - 0.01 * step for step in range(500)]
    assert smooth(line)[:-6] == pytest.approx(line[:-6])
    assert smooth([3.0, 2.0]) == [3.0, 2.0]


def test_smoothing_averages_noise_out():
    noisy = [1.0 + (-1) ** step for step in range(1000)]
    assert all(abs(value - 1.0) < 0.15 for value in smooth(noisy)[20:-20])


def test_thinning_keeps_peaks():
    low, high = thin(Series(steps=[1, 2, 3, 4], values=[5.0, 1.0, 2.0, 8.0]), points=2)
    assert (low.steps, low.values, high.values) == ([2, 4], [1.0, 2.0], [5.0, 8.0])
    spike = [0.0] * 5000
    spike[1234] = 9.0
    assert max(thin(Series(steps=list(range(5000)), values=spike))[1].values) == 9.0
    assert len(thin(Series(steps=list(range(5000)), values=spike))[0].steps) == 1000


def test_names_keep_their_distance_and_their_order():
    assert _apart([0.5, 0.5, 0.9], gap=0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert _apart([0.9, 0.5], gap=0.1) == [0.9, 0.5]
    crowded = _apart([0.50, 0.52, 0.1, 0.51, 0.58], gap=0.06)
    ordered = sorted(crowded)
    assert all(above - below >= 0.06 - 1e-9 for below, above in pairwise(ordered))
    assert crowded[2] == 0.1 and crowded[0] < crowded[3] < crowded[1] < crowded[4]


def test_ticks_are_short():
    assert [_tick(v, high=20_000) for v in (0, 5000, 20_000)] == ["0", "5k", "20k"]
    assert _tick(300, high=300) == "300" and _tick(1_500_000, high=2e6) == "1.5M"
    assert [_scientific(v) for v in (0.0, 7.5e-4, 1e-3)] == ["0", "7.5e-4", "1e-3"]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title, axes._left_title)]


def test_a_run_s_lines_are_named_at_their_ends(write_run):
    said = texts(draw([read_run(write_run(steps=4))], "tiny"))
    assert "training 2.000" in said and "validation 2.250" in said
    assert {"Loss", "Learning rate", "Gradient norm", "Tokens per second"} <= set(said)


def test_several_runs_are_named_by_run(write_run):
    runs = [read_run(write_run("a")), read_run(write_run("b" * 40, shift=1.0))]
    said = texts(draw(runs, "two"))
    assert "a 2.000" in said and any(text.startswith("b" * 23 + "\u2026") for text in said)


def test_names_end_inside_the_picture(write_run):
    figure = draw([read_run(write_run("w" * 24)), read_run(write_run("m" * 24, shift=100.0))], "two")
    figure.canvas.draw()
    right = figure.bbox.x1
    assert all(text.get_window_extent().x1 <= right for text in figure.axes[0].texts)


def test_quantities_that_never_change_get_no_panel(write_run, tmp_path):
    names = ["loss", "balance_loss"]
    assert "Balance loss" in texts(draw_panels([read_run(write_run())], names))
    with MetricsLogger(tmp_path / "still", total_steps=2, log_interval=2) as metrics:
        for step in (1, 2):
            metrics.log(step, {"loss": 1.0, "balance_loss": 1.0}, tokens=1, seconds=1.0)
    assert draw_panels([read_run(tmp_path / "still")], names) is None


def test_reinforcement_learning_begins_with_the_papers_curves(tmp_path):
    values = {
        "loss": 0.1,
        "lr": 1e-3,
        "reward": 0.5,
        "response_length": 9.0,
        "entropy": 0.3,
        "grad_norm": 1.0,
    }
    with MetricsLogger(tmp_path, total_steps=2, log_interval=2) as metrics:
        for step in (1, 2):
            metrics.log(step, values | {"loss_tokens": 64.0}, tokens=100, seconds=1.0)
    titles = [axes.get_title(loc="left") for axes in draw([read_run(tmp_path)], "rl").axes]
    assert titles == [
        "Reward", "Response length", "Entropy", "Gradient norm", "Trained tokens per step", "Tokens per second",
        "Learning rate",
    ]  # fmt: skip


def test_no_text_asks_for_a_mathematical_font(tmp_path):
    """A font that is not installed is a warning for each text; powers of ten would ask for one."""
    with MetricsLogger(tmp_path, total_steps=2, log_interval=2) as metrics:
        for step, grad_norm in ((1, 0.001), (2, 500.0)):
            metrics.log(step, {"loss": 1.0, "grad_norm": grad_norm}, tokens=1, seconds=1.0)
    figure = draw([read_run(tmp_path)], "wide")
    figure.canvas.draw()
    scales = [axes.get_yscale() for axes in figure.axes]
    assert "log" in scales
    axes = figure.axes[scales.index("log")]
    said = [label.get_text() for label in axes.get_yticklabels(which="both")]
    assert any(said) and not any("$" in text for text in said)


@pytest.mark.parametrize("values", [{"loss": 2.0}, {"reward": 0.5}, {}])
def test_one_step_is_enough_and_loss_is_not_needed(tmp_path, values):
    with MetricsLogger(tmp_path, total_steps=1, log_interval=1) as metrics:
        metrics.log(1, values, tokens=1, seconds=1.0)
    assert to_png(draw([read_run(tmp_path)], "one")).startswith(b"\x89PNG")
