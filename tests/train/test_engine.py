"""One optimizer step: what is refused, what is clipped, what accumulates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from megatron_ring.data.batch.microbatch import pack_microbatch
from megatron_ring.train.objective import LossTerms, NextTokenObjective
from tests.helpers.model.small import (
    OBJECTIVE,
    assert_close,
    batch,
    gradients,
    moments_of,
    small_engine,
    weights,
)


@dataclass(frozen=True, kw_only=True)
class Scaled(NextTokenObjective):
    """The objective times a factor, at the loss or only in the backward pass."""

    factor: float = 1.0
    only_gradient: bool = False

    def __call__(self, logits, microbatch) -> LossTerms:
        terms = super().__call__(logits, microbatch)
        loss = terms.loss_sum
        scaled = (
            loss.detach() + (loss - loss.detach()) * self.factor if self.only_gradient else loss * self.factor
        )
        return replace(terms, loss_sum=scaled)


def one_sample_microbatches(count: int, per_microbatch: int):
    """The same ``count`` samples, ``per_microbatch`` to a microbatch."""
    generator = torch.Generator().manual_seed(4)
    samples = []
    for length in (11, 16, 3, 7, 16, 5, 1, 16)[:count]:
        tokens = torch.randint(0, 250, (length + 1,), generator=generator)
        samples.append((tokens[:-1], tokens[1:], (torch.rand(length, generator=generator) > 0.2).float()))
    groups = [samples[i : i + per_microbatch] for i in range(0, count, per_microbatch)]
    return [pack_microbatch(group, 16 * per_microbatch) for group in groups]


@pytest.mark.parametrize("model", ["v1", "v2_mtp", "dense"])
def test_gradients_do_not_depend_on_how_samples_are_dealt_to_microbatches(model):
    """Without the balance loss, which is a property of a microbatch: eight of one sample are one of eight."""
    with small_engine(model, moe_aux_loss_coeff=0.0) as engine:
        whole = engine.accumulate(one_sample_microbatches(8, 8), OBJECTIVE)
        whole_gradients = gradients(engine)
        for per_microbatch in (1, 4):
            parts = engine.accumulate(one_sample_microbatches(8, per_microbatch), OBJECTIVE)
            assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
            assert parts.z_loss == pytest.approx(whole.z_loss, rel=1e-6)
            assert parts.means == pytest.approx(whole.means, rel=1e-6)
            assert_close(gradients(engine), whole_gradients, 2e-5)


def test_accumulating_again_starts_afresh():
    with small_engine("v2_mtp") as engine:
        first = engine.accumulate(batch(), OBJECTIVE)
        kept = gradients(engine)
        assert engine.accumulate(batch(), OBJECTIVE) == first
        assert_close(gradients(engine), kept, 1e-12)


def test_the_loss_falls_when_a_batch_is_learnt_by_heart():
    with small_engine("v2_mtp") as engine:
        losses = [engine.step(batch(), OBJECTIVE, 3e-3).loss for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("only_gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_every_bit_alone(value, only_gradient):
    with small_engine("v2", moe_router_warmup_iters=5) as engine:
        engine.step(batch(), OBJECTIVE, 1e-3)
        before = weights(engine)
        masters = [p.clone() for group in engine.optimizer.param_groups for p in group["params"]]
        moments = moments_of(engine)
        report = engine.step(
            batch(seed=8), Scaled(factor=value, only_gradient=only_gradient), 1e-3, warmup=0.5
        )
        assert not report.finite
        assert all(
            torch.equal(old, new) for old, new in zip(before.values(), weights(engine).values(), strict=True)
        )
        after = [p for group in engine.optimizer.param_groups for p in group["params"]]
        assert all(map(torch.equal, masters, after))
        assert all(map(torch.equal, moments, moments_of(engine)))
        healthy = engine.step(batch(seed=8), OBJECTIVE, 1e-3)
        assert healthy.finite
        assert not torch.equal(before["output_layer.weight"], weights(engine)["output_layer.weight"])


def first_moment_norm(engine) -> float:
    """After the first Adam step the first moment is (1 - beta1) times the gradient that was applied."""
    states = [s for part in engine.optimizer.chained_optimizers for s in part.optimizer.state.values()]
    return torch.stack([s["exp_avg"].norm() for s in states]).norm().item() / (1 - 0.9)


@pytest.mark.parametrize("factor", [1.0, 1000.0], ids=["small", "large"])
def test_gradients_above_the_limit_are_scaled_down_to_it_and_others_left_alone(factor):
    with small_engine("v1", clip_grad=40.0) as engine:
        report = engine.step(batch(), Scaled(factor=factor), 1e-3)
        applied = first_moment_norm(engine)
    if factor == 1.0:
        assert report.grad_norm < 40 and applied == pytest.approx(report.grad_norm, rel=1e-5)
    else:
        assert report.grad_norm > 400 and applied == pytest.approx(40.0, rel=1e-4)


def test_a_limit_of_0_never_clips():
    with small_engine("v1", clip_grad=0.0) as engine:
        report = engine.step(batch(), Scaled(factor=1000.0), 1e-3)
        assert first_moment_norm(engine) == pytest.approx(report.grad_norm, rel=1e-5)


def test_the_reported_norm_is_that_of_all_gradients():
    with small_engine("v2_mtp") as engine:
        report = engine.accumulate(batch(), OBJECTIVE)
        norm = torch.stack([g.double().norm() for g in gradients(engine).values()]).norm().item()
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)


def test_vectors_are_not_decayed_and_matrices_are():
    with small_engine("v1", weight_decay=0.5, moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0) as engine:
        before = weights(engine)
        # a gradient of nothing: only decay moves weights
        engine.step(batch(), Scaled(factor=0.0), 1e-2)
        after = weights(engine)
    for name, old in before.items():
        if old.dim() > 1:
            torch.testing.assert_close(after[name], old * (1 - 1e-2 * 0.5), rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(after[name], old), name


def test_bf16_weights_are_rounded_main_parameters():
    """Steps too small for bf16 still add up in the fp32 main parameters."""
    with small_engine("v1", bf16=True) as engine:
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        before = weights(engine)[name]
        assert before.dtype == torch.bfloat16
        for _ in range(4):
            assert engine.step(batch(), OBJECTIVE, 1e-7).finite
        mains = torch.cat([p.flatten() for group in engine.optimizer.param_groups for p in group["params"]])
        assert mains.dtype == torch.float32
        still = (weights(engine)[name] == before).float().mean()
        assert still > 0.9
        assert (mains != mains.bfloat16().float()).float().mean() > 0.5


def test_evaluation_and_scores_are_those_of_the_step_and_leave_no_trace():
    with small_engine("v2_mtp") as engine:
        before = weights(engine)
        evaluation = engine.evaluate(batch(), OBJECTIVE)
        report = engine.accumulate(batch(), OBJECTIVE)
        assert evaluation == pytest.approx(report.means, rel=1e-5)
        total = 0.0
        for microbatch, (logp_T, entropy_T) in zip(batch(), engine.score(batch()), strict=True):
            total -= (logp_T * microbatch.loss_mask_T).sum().item()
            assert (logp_T[microbatch.labels_T < 0] == 0).all()
            assert (entropy_T >= 0).all()
        assert total / report.denominator == pytest.approx(report.means["lm_loss"], rel=1e-5)
        assert all(
            torch.equal(old, new) for old, new in zip(before.values(), weights(engine).values(), strict=True)
        )
