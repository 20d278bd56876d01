"""Learning rate, batch-size ramp and spike rule as functions of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from megatron_ring.config.train import TrainConfig
from megatron_ring.train.schedule import SpikeRule, global_batch_size, learning_rate

PEAK, FLOOR = 1e-3, 1e-4


def schedule(**settings) -> list[float]:
    config = TrainConfig(
        **{"lr": PEAK, "min_lr": FLOOR, "train_iters": 100, "lr_warmup_iters": 10, **settings}
    )
    return [learning_rate(step, config) for step in range(120)]


ANNEALS = ["linear", "cosine", "exponential", "minus_sqrt"]
WSD = [{"lr_decay_style": "WSD", "lr_wsd_decay_iters": 40, "lr_wsd_decay_style": style} for style in ANNEALS]
STYLES = [{"lr_decay_style": style} for style in ("constant", "cosine", "inverse-square-root")] + WSD


@pytest.mark.parametrize("settings", STYLES, ids=lambda s: "-".join(map(str, s.values())))
def test_every_schedule_warms_up_to_the_peak_and_never_jumps_or_rises_after(settings):
    rates = schedule(**settings)
    assert rates[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert max(rates) == rates[9]
    after = rates[9:]
    assert all(later <= earlier for earlier, later in pairwise(after))
    steepest = {"exponential": 0.04, "minus_sqrt": 0.16}.get(settings.get("lr_wsd_decay_style", ""), 0.06)
    assert max(earlier - later for earlier, later in pairwise(after)) <= steepest * (PEAK - FLOOR)
    floor = PEAK if settings["lr_decay_style"] == "constant" else FLOOR
    if settings["lr_decay_style"] != "inverse-square-root":
        assert rates[100:] == pytest.approx([floor] * 20)


def test_cosine_is_half_way_in_the_middle():
    assert schedule(lr_decay_style="cosine")[55] == pytest.approx((PEAK + FLOOR) / 2)


@pytest.mark.parametrize(
    ("style", "middle"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", 2 * 0.5**0.5 - 1), ("minus_sqrt", 1 - math.sqrt(0.5))],
)
def test_wsd_is_flat_then_anneals_in_its_form(style, middle):
    rates = schedule(lr_decay_style="WSD", lr_wsd_decay_iters=40, lr_wsd_decay_style=style)
    assert rates[10:60] == [PEAK] * 50
    assert rates[60] < PEAK
    assert rates[79] == pytest.approx(FLOOR + (PEAK - FLOOR) * middle)
    assert rates[99] == pytest.approx(FLOOR)


def test_wsd_without_an_anneal_stays():
    assert schedule(lr_decay_style="WSD")[10:100] == [PEAK] * 90


def test_inverse_square_root_halves_when_the_step_quadruples_and_stops_at_the_floor():
    rates = schedule(lr_decay_style="inverse-square-root")
    assert rates[39] == pytest.approx(PEAK / 2)
    config = TrainConfig(lr=PEAK, min_lr=FLOOR, lr_warmup_iters=10, lr_decay_style="inverse-square-root")
    assert learning_rate(10**6, config) == FLOOR


def test_the_decay_may_end_before_or_after_the_run():
    assert schedule(lr_decay_style="cosine", lr_decay_iters=50)[50:] == pytest.approx([FLOOR] * 70)
    assert schedule(lr_decay_style="cosine", lr_decay_iters=190)[100] == pytest.approx((PEAK + FLOOR) / 2)


def test_the_rate_is_a_function_of_the_step_alone():
    """Nothing to resume: asked in any order, each step has one answer."""
    config = TrainConfig(
        lr=PEAK, lr_warmup_iters=3, lr_decay_style="WSD", lr_wsd_decay_iters=5, train_iters=20
    )
    forward = [learning_rate(step, config) for step in range(20)]
    backward = [learning_rate(step, config) for step in reversed(range(20))]
    assert forward == backward[::-1]


def test_the_batch_grows_in_equal_shares_of_the_samples():
    config = TrainConfig(global_batch_size=16, rampup_batch_size=(4, 4, 90))
    sizes = {consumed: global_batch_size(consumed, config) for consumed in (0, 29, 30, 59, 60, 89, 90, 10**6)}
    assert sizes == {0: 4, 29: 4, 30: 8, 59: 8, 60: 12, 89: 12, 90: 16, 10**6: 16}
    assert global_batch_size(0, TrainConfig(global_batch_size=16)) == 16
    assert global_batch_size(0, TrainConfig(global_batch_size=16, rampup_batch_size=(16, 4, 90))) == 16


def rule(**settings) -> SpikeRule:
    return SpikeRule(**{"factor": 2.0, "window": 4, "retry_lr_factor": 0.5, **settings})


def test_a_spike_is_skipped_and_its_retry_slowed():
    spikes = rule()
    assert [spikes.judge(loss, retried=False) for loss in (3, 3, 3, 3, 7)] == [1, 1, 1, 1, 0]
    assert spikes.judge(5.9, retried=False) == 1, "just under twice the mean"
    assert spikes.judge(20.0, retried=True) == 0.5


def test_nothing_is_a_spike_before_the_window_is_full_or_when_off():
    assert [rule().judge(loss, retried=False) for loss in (1, 9, 80)] == [1, 1, 1]
    off = rule(factor=0.0)
    assert [off.judge(loss, retried=False) for loss in (1, 1, 1, 1, 1000)] == [1] * 5


def test_a_skipped_loss_does_not_enter_the_mean_and_old_losses_leave_it():
    spikes = rule()
    for loss in (1, 1, 1, 1):
        spikes.judge(loss, retried=False)
    assert [spikes.judge(100, retried=False) for _ in range(3)] == [0, 0, 0]
    for loss in (1.9, 1.9, 1.9, 1.9):
        assert spikes.judge(loss, retried=False) == 1
    assert spikes.judge(3.7, retried=False) == 1, "the mean is 1.9 now"


def test_a_resumed_rule_judges_as_the_first_would():
    first, second = rule(), rule()
    for loss in (3, 4, 5, 6, 7):
        first.judge(loss, retried=False)
    second.load_state_dict(first.state_dict())
    for loss in (12, 11, 3, 9, 18):
        assert first.judge(loss, retried=False) == second.judge(loss, retried=False)
