"""What the router counts over a step, seen through the engine: padding, recompute, bias, warm-up, replay."""

from __future__ import annotations

import pytest
import torch

from megatron_ring.model.packed import pack_inputs
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.model.small import assert_close, batch, gradients, small_engine, weights

OBJECTIVE = NextTokenObjective(mtp_loss_scaling_factor=0.3)


@pytest.mark.parametrize("model", ["v1", "v2_mtp", "dense"])
def test_more_padding_changes_nothing(model):
    with small_engine(model) as engine:
        tight = engine.accumulate(batch(48), OBJECTIVE)
        tight_gradients = gradients(engine)
        loose = engine.accumulate(batch(61), OBJECTIVE)
        for name in ("loss", "grad_norm", "balance_loss", "z_loss", "max_violation", "denominator"):
            assert getattr(loose, name) == pytest.approx(getattr(tight, name), rel=1e-6), name
        assert_close(gradients(engine), tight_gradients, 1e-5)


def expert_biases(engine) -> list[torch.Tensor]:
    return [router.expert_bias.clone() for router in engine.routers]


def test_the_expert_bias_moves_once_per_step_and_never_in_evaluation():
    rate = 0.25
    with small_engine("v2_mtp", moe_router_bias_update_rate=rate, recompute_granularity="full") as engine:
        before = expert_biases(engine)
        engine.evaluate(batch(), OBJECTIVE)
        engine.score(batch())
        report = engine.accumulate(batch(), OBJECTIVE)
        for router, old in zip(engine.routers, before, strict=True):
            assert torch.equal(router.expert_bias, old)
        loads = [router.load_E.clone() for router in engine.routers]
        assert len(loads) == 4, "three layers with experts and the multi-token-prediction layer"
        for load_E in loads:
            assert load_E.sum() == 2 * sum(m.num_valid for m in batch()), (
                "each valid token counts once per choice"
            )
        engine.update(report, 1e-3)
        for router, old, load_E in zip(engine.routers, before, loads, strict=True):
            moved_E = router.expert_bias - old
            torch.testing.assert_close(moved_E, rate * torch.sign(load_E.mean() - load_E).float())
            assert not router.load_E.any()
        after = expert_biases(engine)
        engine.evaluate(batch(), OBJECTIVE)
        assert all(map(torch.equal, after, expert_biases(engine)))


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_warm_up_statistics_move_once_per_step_under_recompute_too(recompute):
    modules = {"recompute_modules": ("moe",)} if recompute == "selective" else {}
    settings = {"moe_router_warmup_iters": 10, "recompute_granularity": recompute, **modules}
    with small_engine("v1", **settings) as engine:
        torch.manual_seed(1)
        report = engine.accumulate(batch(), OBJECTIVE, warmup=0.5)
        valid = sum(m.num_valid for m in batch())
        moments = [router.logit_moments.clone() for router in engine.routers]
        for count, _, _ in moments:
            assert count == valid * 8, "each valid token's eight logits once"
        norm = report.grad_norm
        engine.update(report, 0.0)
        for router, (count, total, squares) in zip(engine.routers, moments, strict=True):
            mean = total / count
            assert router.logit_mean.item() == pytest.approx(0.1 * mean.item(), rel=1e-5)
            std = (squares / count - mean**2).sqrt()
            assert router.logit_std.item() == pytest.approx(0.9 + 0.1 * std.item(), rel=1e-5)
    with small_engine("v1", moe_router_warmup_iters=10) as engine:
        torch.manual_seed(1)
        # the recomputed forward pass sees the noise of the first
        assert engine.accumulate(batch(), OBJECTIVE, warmup=0.5).grad_norm == pytest.approx(norm, rel=1e-6)


def test_frozen_routers_stay_and_everything_else_learns():
    with small_engine("v2", freeze_moe_router=True) as engine:
        before = weights(engine)
        engine.step(batch(), OBJECTIVE, 1e-2)
        after = weights(engine)
        same = {name for name, value in before.items() if torch.equal(value, after[name])}
        assert same == {name for name in before if ".router." in name}
        assert len(same) == 6, "weight and expert bias of three layers"


def test_a_replayed_step_takes_the_recorded_routes_in_every_layer():
    microbatch = batch(count=1)[0]
    with small_engine("v1") as engine:
        model = engine.models[0].eval()
        generator = torch.Generator().manual_seed(4)
        routes_LTK = torch.stack(
            [torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(48)]) for _ in range(4)]
        )
        seen = []
        for router in engine.routers:
            router.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing.experts_TK))
        with torch.no_grad():
            replayed = model(microbatch, pack_inputs(microbatch, routes_LTK=routes_LTK)).main_TV
            assert torch.equal(torch.stack(seen)[:, microbatch.valid_T], routes_LTK[:, microbatch.valid_T])
            seen.clear()
            free = model(microbatch, pack_inputs(microbatch)).main_TV
            again = model(microbatch, pack_inputs(microbatch, routes_LTK=torch.stack(seen))).main_TV
        valid_T = microbatch.valid_T
        assert not torch.allclose(replayed[valid_T], free[valid_T], rtol=1e-3)
        torch.testing.assert_close(again[valid_T], free[valid_T])
