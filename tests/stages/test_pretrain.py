"""The pre-training page: what it does with spikes, broken losses, limits and signals, on a tiny corpus in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.data.corpus.writer import write_corpus
from megatron_ring.errors import RingError
from megatron_ring.runtime.session import open_session
from megatron_ring.stages.pretrain import PretrainRun, pretrain
from tests.helpers.e2e.runs import records
from tests.helpers.model.small import weights
from tests.helpers.parallel.cases import MODELS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """Forty documents that count upwards, so that there is something to learn."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "counting")
    with write_corpus(prefix, vocab_size=250, manifest={}) as writer:
        for start in range(40):
            writer.add((np.arange(120) + 7 * start) % 240)
    return prefix


@pytest.fixture
def configure(corpus, tmp_path) -> Callable:
    def make(model: str = "v1", **settings):
        values = {
            **MODELS[model],
            "seq_length": 32,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "data_path": (corpus,),
            "split": "80,20,0",
            "train_iters": 4,
            "lr": 2e-3,
            "log_level": "error",
            "metrics_file": str(tmp_path / "metrics.jsonl"),
            **settings,
        }
        config = config_from_mapping(values)
        validate(config, 1)
        return config

    return make


def spoil(monkeypatch, factors: list[float]) -> list[PretrainRun]:
    """Multiply the loss of the n-th step by ``factors[n]``; the run comes back."""
    runs: list[PretrainRun] = []
    accumulate = PretrainRun.train_step

    def step(self: PretrainRun, metrics) -> None:
        if not runs:
            runs.append(self)
        factor = factors[self.step] if self.step < len(factors) else 1.0
        original = self.objective

        class Spoiled:
            sum_names, peak_names = original.sum_names, original.peak_names
            local_denominator = staticmethod(original.local_denominator)

            def __call__(self, logits, microbatch):
                from dataclasses import replace

                terms = original(logits, microbatch)
                return replace(terms, loss_sum=terms.loss_sum * factor)

        self.objective = Spoiled()
        try:
            accumulate(self, metrics)
        finally:
            self.objective = original

    monkeypatch.setattr(PretrainRun, "train_step", step)
    return runs


@pytest.mark.parametrize("model", ["v2_mtp", "dense"])
def test_the_loss_falls_and_every_step_is_recorded_once(configure, tmp_path, model):
    pretrain(configure(model, train_iters=24, eval_interval=12, eval_iters=1, lr=1e-2))
    steps = records(tmp_path)
    assert [record["step"] for record in steps] == list(range(1, 25))
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    validations = records(tmp_path, "eval")
    assert [record["step"] for record in validations] == [12, 24]
    assert validations[1]["loss"] < validations[0]["loss"]
    assert ("mtp_loss" in steps[0]) == (model == "v2_mtp")


@pytest.mark.parametrize("model", ["v1", "v2"])
def test_one_expert_per_token_is_trained_and_so_are_its_routers(configure, tmp_path, model):
    """Without balance loss, z-loss and weight decay only the chosen weight moves a router."""
    engines = []

    class Watched(PretrainRun):
        def train_step(self, metrics):
            engines.append(weights(self.engine))
            super().train_step(metrics)
            engines.append(weights(self.engine))

    still = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0, "weight_decay": 0.0}
    config = configure(model, moe_router_topk=1, train_iters=12, **still)
    with open_session(config.parallel, seed=config.train.seed) as session:
        Watched(config, session).run()
    routers = [name for name in engines[0] if name.endswith("router.weight")]
    assert len(routers) == config.model.num_moe_layers
    assert not any(torch.equal(engines[0][name], engines[1][name]) for name in routers)
    losses = [record["loss"] for record in records(tmp_path)]
    assert losses[-1] < 0.95 * losses[0]


def test_the_same_run_twice_gives_the_same_losses(configure, tmp_path):
    seen = []
    for _ in range(2):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        pretrain(configure())
        seen.append([(record["loss"], record["grad_norm"]) for record in records(tmp_path)])
    assert seen[0] == seen[1]


def test_a_broken_step_is_refused_and_the_run_goes_on(configure, tmp_path, monkeypatch):
    spoil(monkeypatch, [1.0, float("nan"), float("inf"), 1.0])
    pretrain(configure())
    assert [record["skipped"] for record in records(tmp_path)] == [0, 1, 1, 0]


def test_three_broken_steps_running_end_the_run_in_one_line(configure, monkeypatch):
    spoil(monkeypatch, [1.0, float("nan"), 1.0, float("nan"), float("nan"), float("nan")])
    with pytest.raises(
        RingError, match=r"loss=nan for 3 steps running \(last: step 6\).*lower --lr"
    ) as caught:
        pretrain(configure(train_iters=9))
    assert "\n" not in str(caught.value)


def test_a_spike_leaves_the_weights_alone_and_its_samples_come_again(configure, tmp_path, monkeypatch):
    settings = {"loss_spike_factor": 2.0, "loss_spike_window": 3, "train_iters": 16}
    spoil(monkeypatch, [1, 1, 1, 1, 50.0])
    taken, before_after = [], []
    take, judge = PretrainRun._own_indices, PretrainRun._rate_multiplier

    def note_draw(self, draw):
        if not taken or taken[-1] is not draw:
            taken.append(draw)
        return take(self, draw)

    def note_judgement(self, report, draw):
        multiplier = judge(self, report, draw)
        before_after.append((draw, multiplier, weights(self.engine)))
        return multiplier

    monkeypatch.setattr(PretrainRun, "_rate_multiplier", note_judgement)
    pretrain(configure(**settings))
    monkeypatch.undo()
    multipliers = [multiplier for _, multiplier, _ in before_after]
    assert multipliers[:6] == [1, 1, 1, 1, None, 1]
    spiked, later = before_after[4], before_after[5]
    assert all(map(torch.equal, spiked[2].values(), later[2].values())), "the skipped update changed nothing"
    assert not torch.equal(before_after[3][2]["output_layer.weight"], spiked[2]["output_layer.weight"])
    retried = {
        index
        for draw, _, _ in before_after[5:]
        for index, is_retry in zip(draw.indices, draw.is_retry, strict=True)
        if is_retry
    }
    assert retried and retried <= set(spiked[0].indices)
    assert records(tmp_path)[4]["skipped"] == 1


def test_exit_interval_saves_and_leaves_and_the_next_start_goes_on(configure, tmp_path):
    run = str(tmp_path / "run")
    settings = {"save": run, "load": run, "exit_interval": 2, "train_iters": 4, "keep_last_n": 1}
    pretrain(configure(**settings))
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    pretrain(configure(**settings))
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    names = sorted(path.name for path in Path(run).iterdir() if path.name.startswith("iter"))
    assert names == ["iter_0000004"]


def test_a_signal_ends_the_run_after_its_step(configure, tmp_path, monkeypatch):
    train_step = PretrainRun.train_step

    def step(self, metrics):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        train_step(self, metrics)

    monkeypatch.setattr(PretrainRun, "train_step", step)
    pretrain(configure())
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_the_batch_ramp_is_followed(configure, tmp_path):
    pretrain(configure(rampup_batch_size=(2, 2, 4), train_iters=4))
    assert [record["global_batch_size"] for record in records(tmp_path)] == [2, 2, 4, 4]


def test_routing_warm_up_runs_from_noise_to_the_true_logits(configure):
    config = configure(moe_router_warmup_iters=4)
    with open_session(config.parallel, seed=1) as session:
        run = PretrainRun(config, session)
        shares = []
        for run.step in range(6):
            shares.append(run._routing_warmup())
    assert shares == [0, 0.25, 0.5, 0.75, 1, 1]
