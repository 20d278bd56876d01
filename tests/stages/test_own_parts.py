"""An objective and an advantage estimator of a user's own train from the command line, by ``module:name``."""

from __future__ import annotations

import runpy
import sys

import pytest

from megatron_ring.rl.learn.objective import POLICY_LOSSES
from tests.helpers.e2e.runs import ROOT, flags, records

OWN = "tests.helpers.rl.own_parts"
FIGURES = ("loss", "policy_loss", "grad_norm", "loss_tokens", "reward", "clip_fraction")


@pytest.fixture(autouse=True)
def forgotten():
    """What the module registers stays in this test."""
    yield
    POLICY_LOSSES.pop("mine", None)
    sys.modules.pop(OWN, None)


def train(values, monkeypatch, capsys, **settings: object) -> tuple[int, list[str]]:
    """Exit code and error lines of the RL entry point with the tiny run's flags."""
    plain = {"entropy_coef": 0.0, "train_iters": 2, "minibatches_per_step": 2, "lr": 0.02}
    words = flags({name.replace("_", "-"): value for name, value in values(**plain, **settings).items()})
    monkeypatch.setattr("sys.argv", ["rl_ring.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples/rl_ring.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr, stderr
    return ended.value.code, [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("objective", ["doubled", "mine"], ids=["an attribute", "a registered one"])
def test_twice_the_surrogate_of_half_the_advantage_is_the_same_step(
    values, monkeypatch, capsys, tmp_path, objective
):
    built_in = {"objective": "dapo", "advantage_estimator": "group_mean"}
    assert train(values, monkeypatch, capsys, **built_in) == (0, [])
    expected = [[step[name] for name in FIGURES] for step in records(tmp_path)]
    (tmp_path / "metrics.jsonl").unlink()
    own = {"objective": f"{OWN}:{objective}", "advantage_estimator": f"{OWN}:half"}
    assert train(values, monkeypatch, capsys, **own) == (0, [])
    assert [[step[name] for name in FIGURES] for step in records(tmp_path)] == expected
    assert len(expected) == 2 and expected[0][2] > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "ppo"}, "--objective ppo: the value must be one of c3po, "),
        (
            {"objective": "no_such:loss"},
            "objective=no_such:loss: no module no_such; install it or set PYTHONPATH",
        ),
        (
            {"objective": f"{OWN}:gone"},
            f"objective={OWN}:gone: module {OWN} neither has nor registers gone; correct the name",
        ),
        (
            {"objective": f"{OWN}:half"},
            f"objective={OWN}:half is function, not PolicyLoss; name a PolicyLoss(",
        ),
        (
            {"advantage_estimator": f"{OWN}:twice"},
            f"advantage_estimator={OWN}:twice does not take the rewards as its one argument (missing a required",
        ),
        (
            {"advantage_estimator": f"{OWN}:doubled"},
            f"advantage_estimator={OWN}:doubled is PolicyLoss, not a function; write a function of one group's",
        ),
        (
            {"advantage_estimator": f"{OWN}:too_few"},
            "advantage_estimator: too_few must give one finite number per reward, and for [",
        ),
        (
            {"advantage_estimator": f"{OWN}:unable"},
            f"advantage_estimator={OWN}:unable raised ArithmeticError: cannot compare (own_parts.py, line ",
        ),
        (
            # its close() raises as well, which is not the cause
            {"rollout_engine": f"{OWN}:Dying"},
            f"rollout_engine={OWN}:Dying raised ArithmeticError: cannot decode (own_parts.py, line ",
        ),
    ],
)
def test_what_is_none_is_one_line(values, monkeypatch, capsys, settings, said):
    code, lines = train(values, monkeypatch, capsys, **settings)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"error: {said}")


def test_an_own_objective_that_divides_by_the_budget_needs_one(values, monkeypatch, capsys, tmp_path):
    (tmp_path / "budgeted.py").write_text(
        "from megatron_ring.rl.learn.objective.policy_losses import PolicyLoss, budget, token_ratio\n"
        "loss = PolicyLoss(surrogate=token_ratio, token_weight='1', denominator=budget)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, lines = train(values, monkeypatch, capsys, objective="budgeted:loss", token_budget=0)
    assert (code, lines) == (
        2,
        ["error: token_budget=0 is what objective=budgeted:loss divides by; set --token-budget"],
    )
