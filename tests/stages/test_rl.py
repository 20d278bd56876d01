"""Reinforcement learning in this process: what a step says, what is replayed, resumed and refused."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.errors import CheckpointError
from megatron_ring.rl.learn.critic import Critic
from megatron_ring.runtime.session import open_session
from megatron_ring.stages.rl import RlRun, train_rl
from tests.helpers.e2e.runs import ROOT, flags, records
from tests.helpers.model.small import weights

NEVER = {
    "dynamic_sampling": True,
    "dynamic_sampling_max_rounds": 2,
    "reward_functions": ["toy=tests.helpers.e2e.toy_reward:never"],
}


def test_a_step_says_what_it_did(configure, folder, tmp_path):
    held_out = {"eval_prompt_data": (str(folder / "held_out.jsonl"),), "eval_prompts": 9, "eval_interval": 2}
    train_rl(configure(**held_out, minibatches_per_step=2, kl_loss_coef=1e-2, save=str(tmp_path / "run")))
    steps, evals = records(tmp_path), records(tmp_path, "eval")
    assert [step["step"] for step in steps] == [1, 2] and [e["step"] for e in evals] == [0, 2]
    for step in steps:
        assert 0 < step["reward"] < 1 and step["reward"] == pytest.approx(step["status/correct"])
        assert 1 <= step["response_length"] <= 24
        assert step["c3po/selected"] == step["c3po/trained"] == step["loss_tokens"] == 160
        assert step["c3po/utilisation"] == 1 and step["c3po/shortfall"] == 0
        assert step["mismatch"] < 1e-4 and step["older_policy_share"] == 0 and step["clamped_fraction"] == 0
        assert step["generated_tokens"] == pytest.approx(24 * step["response_length"])
        assert step["balance_loss"] >= 0.99 and step["max_violation"] > 0
        assert step["packing/fill"] > 0.6 and step["kl"] >= 0 and step["entropy"] > 0
    assert steps[0]["kl"] < steps[1]["kl"], "the policy leaves the reference"
    for held in evals:
        assert held["accuracy"] == pytest.approx(held["reward"]) and held["response_length"] > 0
        assert held["problems"] == 4, "there are no more, and none is asked twice"


@pytest.mark.parametrize("objective", ["grpo", "dapo"])
def test_without_a_budget_every_sampled_token_is_trained_on(configure, tmp_path, objective):
    # an evaluation without held-out problems evaluates nothing
    train_rl(configure(objective=objective, token_budget=0, train_iters=1, eval_interval=1))
    (step,) = records(tmp_path)
    assert step["loss_tokens"] == step["generated_tokens"] == step["c3po/trained"] > 0
    assert "c3po/selected" not in step and step["mismatch"] < 1e-4
    assert records(tmp_path, "eval") == []


@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_replayed_routes_are_those_that_the_routers_choose_until_the_weights_move(
    configure, tmp_path, replay
):
    train_rl(configure(routing_replay=replay, train_iters=1))
    train_rl(configure(routing_replay=replay, train_iters=1, minibatches_per_step=4, lr=0.1, token_budget=60))
    old = tmp_path / "metrics.jsonl.old"
    (moved,) = records(tmp_path)
    old.rename(tmp_path / "metrics.jsonl")
    (first,) = records(tmp_path)
    assert first["router_flip_rate"] == 0 and first["router_flip_rate/0"] == 0
    assert moved["router_flip_rate"] > 0, "after an update the routers choose otherwise"
    assert first["missing_routes"] == 0 and first["loss_tokens"] == 80


@pytest.mark.parametrize("replay", ["none", "R3"])
def test_a_policy_with_one_expert_per_token_samples_and_learns(configure, tmp_path, replay):
    train_rl(configure(moe_router_topk=1, routing_replay=replay, train_iters=1))
    (step,) = records(tmp_path)
    assert step["loss_tokens"] == 80 and step["mismatch"] < 1e-4
    assert step["grad_norm"] > 0


def test_a_step_in_which_nobody_finishes_trains_on_nothing(configure, tmp_path, caplog):
    state: list[dict[str, torch.Tensor]] = []

    class Watched(RlRun):
        def train_step(self, metrics):
            state.append(weights(self.engine))
            super().train_step(metrics)
            state.append(weights(self.engine))

    few = {"rollout_token_budget": 6, "token_budget": 6, "rollout_max_staleness": 16}
    run_with(Watched, configure(**few, train_iters=1, log_level="warning"))
    assert all(map(torch.equal, state[0].values(), state[1].values()))
    (step,) = records(tmp_path)
    assert "reward" not in step and step["loss_tokens"] == 0 and step["generated_tokens"] >= 6
    assert step["c3po/shortfall"] == 6 and step["c3po/carried"] == step["generated_tokens"]
    assert "6 of the token budget were missing" in caplog.text


def run_with(stage: type[RlRun], config) -> None:
    """:func:`train_rl` with a stage that is watched."""
    with open_session(config.parallel, config.train.seed) as session:
        stage(config, session).run()


def test_a_run_with_a_critic_is_resumed_with_its_critic(configure, tmp_path):
    critic = {"critic": True, "advantage_estimator": "gae", "critic_lr": 1e-3, "train_iters": 3}
    found: dict[str, list] = {}
    for name, stops in (("straight", [{}]), ("stopped", [{"exit_interval": 2}, {}])):
        where = tmp_path / name
        for more in stops:
            where_to = {"save": str(where), "load": str(where), "metrics_file": str(where / "metrics.jsonl")}
            train_rl(configure(**critic, **where_to, **more))
        found[name] = [
            (r["step"], r["loss"], r["value_loss"], r["value_mean"], r["reward"]) for r in records(where)
        ]
    assert found["straight"] == found["stopped"] and len(found["straight"]) == 3
    assert found["straight"][0][3] == pytest.approx(0, abs=0.05), "values start at 0"
    assert found["straight"][2][3] != 0, "and are learnt"
    critics = tmp_path / "stopped" / "critic"
    for step in (2, 3):
        assert (critics / f"iter_{step:07d}").is_dir()
    shutil.rmtree(critics / "iter_0000003")
    with pytest.raises(CheckpointError, match="holds no critic for the policy of step 3; drop --critic"):
        where_to = {"save": str(tmp_path / "stopped"), "load": str(tmp_path / "stopped")}
        train_rl(configure(**critic, **where_to))


def test_a_policy_whose_save_fails_keeps_the_critic_of_the_save_before(configure, monkeypatch, tmp_path):
    """The critic of step 2 is there by then, and ``--keep-last-n 1`` is one of each."""
    where = {"save": str(tmp_path / "run"), "load": str(tmp_path / "run"), "keep_last_n": 1}
    run = {"critic": True, "advantage_estimator": "gae", "save_interval": 1, "train_iters": 2, **where}
    write = Checkpointer._write

    def full_disk(self: Checkpointer, sharded, working: Path, strategy):
        if working.name.startswith("iter_0000002") and working.parent.name != "critic":
            raise OSError("No space left on device")
        return write(self, sharded, working, strategy)

    with (
        monkeypatch.context() as patched,
        pytest.raises(CheckpointError, match="the previous checkpoint stays"),
    ):
        patched.setattr(Checkpointer, "_write", full_disk)
        train_rl(configure(**run))
    train_rl(configure(**run))
    assert sorted(path.name for path in (tmp_path / "run").rglob("iter_*")) == ["iter_0000002"] * 2


def test_a_critic_needs_one_response_to_a_prompt_only(configure, tmp_path):
    critic = {"critic": True, "advantage_estimator": "gae", "group_size": 1, "prompts_per_step": 24}
    train_rl(configure(**critic, train_iters=1))
    (step,) = records(tmp_path)
    assert step["c3po/responses_sampled"] == 24 and step["loss_tokens"] == 80


def test_a_minibatch_without_tokens_moves_no_critic(configure, monkeypatch, tmp_path):
    updates = []
    original = Critic.step
    monkeypatch.setattr(Critic, "step", lambda self, grid: updates.append(1) or original(self, grid))
    critic = {"critic": True, "advantage_estimator": "gae", "minibatches_per_step": 2}
    train_rl(configure(**critic, train_iters=1, token_budget=280, overlong="mask"))
    (step,) = records(tmp_path)
    assert 0 < step["c3po/trained"] < 280 and len(updates) == 1 and step["c3po/shortfall"] > 280


LEDGER = ("trained", "cut", "carried", "wasted", "excluded", "stale", "masked")


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        ({}, {"trained", "cut", "wasted"}),
        ({"budget_overshoot": "carry"}, {"trained", "carried"}),
        ({"overlong": "mask"}, {"trained", "masked"}),
        ({"zero_advantage": "exclude", "minibatches_per_step": 2}, {"trained", "excluded"}),
        ({"dynamic_sampling": True, "token_budget": 40}, {"trained", "excluded"}),
        (
            {
                "rollout_token_budget": 120,
                "rollout_concurrency": 5,
                "rollout_max_staleness": 0,
                "overlong": "mask",
                "token_budget": 60,
            },
            {"trained", "carried", "stale", "masked"},
        ),
        (
            {
                "prompts_per_step": 12,
                "rollout_token_budget": 400,
                "rollout_concurrency": 5,
                "rollout_max_staleness": 1,
                "budget_overshoot": "carry",
                "overlong": "mask",
                "token_budget": 2,
            },
            {"trained", "carried", "stale", "masked"},
        ),
        ({"objective": "grpo", "token_budget": 0}, {"trained"}),
    ],
    ids=["token", "carry", "mask", "exclude", "dynamic", "c3po++", "c3po++carry", "none"],
)
def test_every_sampled_token_is_accounted_for(configure, tmp_path, settings, moved):
    """What a step sampled is what it trained on, cut, left, wasted, left out or gave up; and nothing is lost between."""
    train_rl(configure(**{"train_iters": 5, "budget_shortfall": "train", **settings}))
    steps, left = records(tmp_path), 0.0
    for step in steps:
        assert step["c3po/sampled"] == sum(step[f"c3po/{name}"] for name in LEDGER)
        assert step["c3po/sampled"] == step["generated_tokens"] + step["c3po/carried_in"]
        assert step["c3po/carried_in"] == left and step["c3po/trained"] == step["loss_tokens"]
        left = step["c3po/carried"]
    assert {name for name in LEDGER if any(step[f"c3po/{name}"] for step in steps)} >= moved


def test_a_refused_update_trained_on_nothing(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(RlRun, "skip_non_finite", lambda self, report: self.step == 0)
    train_rl(configure())
    first, second = records(tmp_path)
    assert first["c3po/trained"] == first["loss_tokens"] == 0 and first["c3po/utilisation"] == 0
    assert second["c3po/trained"] == 80 and second["c3po/utilisation"] == 1


def test_mismatch_compares_the_engines_not_the_step(configure, tmp_path):
    """With the rollout's log p as the old one, a later minibatch's gap is the update itself: not logged as mismatch."""
    moves = {"old_logprobs": "rollout", "minibatches_per_step": 3, "token_budget": 60, "lr": 0.05}
    train_rl(configure(**moves))
    for step in records(tmp_path):
        assert step["mismatch_max"] < 1e-4 and step["ratio_max"] > 1.01


def test_tokens_of_an_older_policy_are_said(configure, tmp_path):
    train_rl(configure(budget_overshoot="carry", train_iters=3))
    shares = [step["older_policy_share"] for step in records(tmp_path)]
    assert shares[0] == 0 and max(shares[1:]) > 0
    assert all(step["mismatch"] < 1e-4 for step in records(tmp_path) if "mismatch" in step)


def test_returns_of_carried_tokens_stay_what_they_were(configure, tmp_path):
    """Rewards are 0 or 1 and gamma = lambda = 1: a return above 1 would be made of values of another moment."""
    critic = {"critic": True, "advantage_estimator": "gae", "critic_lr": 3e-2, "minibatches_per_step": 2}
    one = {"reward_functions": ["toy=tests.helpers.e2e.toy_reward:one"]}
    train_rl(configure(**critic, **one, budget_overshoot="carry", train_iters=4))
    assert [step["return_mean"] for step in records(tmp_path)] == pytest.approx([1.0] * 4, abs=1e-6)


def test_a_refill_scores_values_and_plans_once(configure, tmp_path, monkeypatch):
    calls = []
    original = Critic.values
    monkeypatch.setattr(Critic, "values", lambda self, given: calls.append(1) or original(self, given))
    critic = {"critic": True, "advantage_estimator": "gae"}
    train_rl(configure(**critic, train_iters=1, budget_shortfall="refill", token_budget=900))
    (step,) = records(tmp_path)
    assert step["rollout_rounds"] > 1 and step["c3po/trained"] == 900 and len(calls) == 1


@pytest.mark.parametrize("overshoot", ["token", "response", "carry"])
def test_a_refill_counts_on_what_is_lost_between_minibatches(configure, tmp_path, overshoot):
    """172 tokens may be sampled for 5 x 30 and one minibatch still lack some, where each cut loses a response's rest."""
    few = {"prompts_per_step": 2, "token_budget": 30, "minibatches_per_step": 5, "budget_shortfall": "refill"}
    train_rl(configure(**few, budget_overshoot=overshoot, train_iters=3, dynamic_sampling_max_rounds=20))
    for step in records(tmp_path):
        assert step["c3po/shortfall"] == 0 and step["c3po/trained"] >= 150


def test_a_refill_gets_there_in_the_rounds_that_it_takes(configure, tmp_path):
    train_rl(
        configure(budget_shortfall="refill", token_budget=1500, dynamic_sampling_max_rounds=4, train_iters=2)
    )
    for step in records(tmp_path):
        assert step["c3po/trained"] == 1500 and step["rollout_rounds"] <= 4


def test_what_goes_on_from_a_checkpoint_must_fit_into_a_microbatch(configure, tmp_path):
    where = {"save": str(tmp_path / "run"), "load": str(tmp_path / "run"), "budget_overshoot": "carry"}
    train_rl(configure(**where, train_iters=1, rollout_token_budget=200))
    small = {
        "max_prompt_length": 14,
        "max_response_length": 10,
        "microbatch_capacity": 24,
        "token_budget": 20,
    }
    with pytest.raises(
        CheckpointError, match=r"microbatch_capacity=24 is less than the .* set --microbatch-capacity"
    ):
        train_rl(configure(**where, **small, train_iters=2, rollout_token_budget=200))


def test_whitened_advantages_run(configure, tmp_path):
    critic = {"critic": True, "advantage_estimator": "gae", "whiten_advantages": True}
    train_rl(configure(**critic, train_iters=2))
    assert [step["c3po/trained"] for step in records(tmp_path)] == [80, 80]


@pytest.mark.parametrize(("asked", "moves"), [(None, False), (1e-3, True)])
def test_the_expert_bias_stands_still_unless_asked(configure, tmp_path, asked, moves):
    biases: list[torch.Tensor] = []

    class Watched(RlRun):
        def train_step(self, metrics):
            super().train_step(metrics)
            biases.append(self.engine.routers[0].expert_bias.clone())

    v2 = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid", "train_iters": 1}
    run_with(Watched, configure(**v2, moe_router_bias_update_rate=asked))
    assert bool(biases[0].any()) == moves


def test_a_shortfall_is_refilled_with_new_prompts(configure, tmp_path):
    train_rl(configure(train_iters=1, budget_shortfall="refill", token_budget=900))
    (step,) = records(tmp_path)
    assert step["rollout_rounds"] > 1 and step["loss_tokens"] == 900 and step["c3po/shortfall"] == 0


def test_problems_outside_the_solve_rates_are_counted_aloud(configure, folder, tmp_path, caplog):
    caplog.set_level("INFO")
    lines = (folder / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"solve_rate": i / len(lines)} for i, line in enumerate(lines)]
    data = tmp_path / "rated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_rl(configure(train_iters=1, prompt_data=(str(data),), solve_rate_max=0.5))
    left_out = sum(row["solve_rate"] > 0.5 for row in rows)
    assert left_out > 5
    line = f"{left_out} problems are left out: their solve rates are outside 0 to 0.5"
    assert line in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt_data": ["{folder}/strange.jsonl"]}, "domain=astrology has no reward function"),
        ({"prompt_data": ["{folder}/empty.jsonl"]}, "empty.jsonl"),
        (
            {"eval_prompt_data": ["{folder}/train.jsonl"], "eval_prompts": 40},
            "all of its 40 problems are held out",
        ),
        ({"prompt_data": ["{folder}/nowhere.jsonl"]}, "nowhere.jsonl does not exist"),
        ({"reward_functions": ["toy=tests.nowhere:even"]}, "tests.nowhere"),
        ({"group_size": 1}, "group_size=1"),
        ({"max_response_length": 400}, "max_position_embeddings=128"),
        ({"token_budget": 0}, "token_budget=0"),
        ({"critic": True}, "critic=True"),
        ({"routing_replay": "R4"}, "R4"),
        (NEVER, "dynamic_sampling found 0 of prompts_per_step=6"),
    ],
)
def test_wrong_input_ends_in_one_line(values, folder, monkeypatch, capsys, wrong, said):
    wrong = {
        name: [str(v).format(folder=folder) for v in value] if isinstance(value, list) else value
        for name, value in wrong.items()
    }
    words = flags({name.replace("_", "-"): value for name, value in values(**wrong).items()})
    monkeypatch.setattr("sys.argv", ["rl_ring.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples/rl_ring.py"), run_name="__main__")
    stderr = capsys.readouterr().err
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    assert said in lines[0]
