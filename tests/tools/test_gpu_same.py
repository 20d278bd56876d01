"""When a GPU's run counts as the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.gpu import same
from tools.gpu.results import Results


def steps(grad_norm: float) -> list[dict]:
    return [{"step": n, "loss_tokens": 8, "c3po/generated": 9, "grad_norm": grad_norm} for n in (1, 2)]


@pytest.mark.parametrize(
    ("norms", "bad", "started"),
    [
        ({}, 0, 2),
        ({f"rl-device-{same.SEEDS[0]}": 1.01}, 0, 4),
        ({f"rl-device-{seed}": 1.01 for seed in same.SEEDS}, 1, 4),
    ],
    ids=["alike", "a draw within rounding", "another gradient"],
)
def test_a_step_that_differs_with_two_seeds_is_wrong(
    norms: dict[str, float], bad: int, started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names: list[str] = []

    def run(_self: object, name: str, *_words: object, on_cpu: bool) -> list[dict]:
        names.append(name)
        assert on_cpu == ("cpu" in name)
        return steps(norms.get(name, 1.0))

    monkeypatch.setattr(same.Runs, "run", run)
    results = Results(tmp_path, "same")
    same.reinforcement(same.Runs(tmp_path, results))()
    assert len(results.bad) == bad and len(names) == started


def test_a_run_that_failed_is_wrong_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names: list[str] = []
    monkeypatch.setattr(
        same.Runs, "run", lambda _self, name, *_, on_cpu: names.append(name) or (steps(1.0) if on_cpu else [])
    )
    results = Results(tmp_path, "same")
    same.reinforcement(same.Runs(tmp_path, results))()
    assert len(names) == 2 and "0 and 2 steps" in results.bad[0]
