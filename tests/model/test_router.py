"""The router against a few lines of fp64 maths: choice, weights, losses, warm-up, replay, freezing, bias."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_ring.config.model import ModelConfig
from megatron_ring.data.batch.microbatch import pack_microbatch
from megatron_ring.model.packed import RouterStepInfo, pack_inputs
from megatron_ring.model.router import RingRouter

E, K, D = 8, 3, 5
SOFTMAX = {"num_experts": E, "moe_router_topk": K, "hidden_size": D}
SIGMOID = {
    **SOFTMAX,
    "moe_router_score_function": "sigmoid",
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
}
SETTINGS = {
    "softmax": SOFTMAX,
    "sigmoid": SIGMOID,
    "softmax-top-1": {**SOFTMAX, "moe_router_topk": 1},
    "sigmoid-top-1": {**SIGMOID, "moe_router_topk": 1},
}


def make_router(dtype=torch.float64, **settings) -> RingRouter:
    model = ModelConfig(**{"moe_router_dtype": "fp64", **settings})
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    router = RingRouter(config, model, SimpleNamespace(tp=None))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=generator, dtype=torch.float64))
        if router.expert_bias is not None:
            router.expert_bias.copy_(0.3 * torch.randn(E, generator=generator))
    router.set_layer_number(1)
    return router


def inputs(lengths=(7, 4), slots=13, seed=1, *, scale=1 / 30, warmup=1.0, routes=None):
    """Hidden states [T, D] that want a gradient, and the packed batch around them."""
    rows = [([1] * n, [1] * n, [1.0] * n) for n in lengths]
    signal = None if scale is None else RouterStepInfo(loss_scale=scale, warmup=warmup)
    packed = pack_inputs(pack_microbatch(rows, slots), router=signal, routes_LTK=routes)
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(slots, D, generator=generator, dtype=torch.float64)
    return hidden_TD.requires_grad_(), packed


def expected_routing(logits_TE: Tensor, model: ModelConfig, bias_E: Tensor | None):
    """Experts (best first) and weights, token by token, said as plainly as possible."""
    experts, weights = [], []
    for logits in logits_TE.tolist():
        row = torch.tensor(logits, dtype=torch.float64)
        scores = row.softmax(0) if model.moe_router_score_function == "softmax" else 1 / (1 + torch.exp(-row))
        wanted = scores if bias_E is None else scores + bias_E.double()
        allowed = set(range(E))
        if model.moe_router_num_groups:
            size = E // model.moe_router_num_groups
            groups = [range(g, g + size) for g in range(0, E, size)]
            groups.sort(key=lambda group, wanted=wanted: -wanted[list(group)].topk(2).values.sum().item())
            allowed = {e for group in groups[: model.moe_router_group_topk] for e in group}
        chosen = sorted(allowed, key=lambda e: -wanted[e].item())[: model.moe_router_topk]
        total = sum(scores[e].item() for e in chosen) if len(chosen) > 1 else 1.0
        experts.append(chosen)
        weights.append([model.moe_router_topk_scaling_factor * scores[e].item() / total for e in chosen])
    return torch.tensor(experts), torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_choice_and_weights_are_the_formulas(settings):
    router = make_router(**settings)
    hidden_TD, packed = inputs(lengths=(20, 13), slots=40)
    routing = router(hidden_TD, packed)
    experts_TK, probs_TK = expected_routing(hidden_TD @ router.weight.T, router.model, router.expert_bias)
    assert torch.equal(routing.experts_TK[:33], experts_TK[:33])
    torch.testing.assert_close(routing.probs_TK[:33], probs_TK[:33], rtol=1e-12, atol=0)
    assert (routing.experts_TK[33:] == E).all() and not routing.probs_TK[33:].any()
    assert routing.counts_E.tolist() == torch.bincount(experts_TK[:33].flatten(), minlength=E).tolist()


def test_the_expert_bias_changes_the_choice_and_not_the_weights():
    router = make_router(**SIGMOID)
    hidden_TD, packed = inputs()
    with torch.no_grad():
        router.expert_bias.zero_()
        router.expert_bias[2:4] = 5.0
    routing = router(hidden_TD, packed)
    kept_TK = routing.experts_TK[:11]
    assert ((kept_TK == 2).any(1) & (kept_TK == 3).any(1)).all()
    scores_TE = torch.sigmoid(hidden_TD @ router.weight.T)[:11]
    chosen_TK = scores_TE.gather(1, kept_TK)
    torch.testing.assert_close(routing.probs_TK[:11], 2.5 * chosen_TK / chosen_TK.sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_router_computes_in_the_precision_asked_for(dtype):
    """fp64 tells apart logits that are one in fp32, from bf16 weights and hidden states."""
    router = make_router(torch.bfloat16, **SOFTMAX, **{"moe_router_dtype": dtype})
    hidden_TD, packed = inputs()
    routing = router(hidden_TD.detach().bfloat16(), packed)
    wide = torch.float64 if dtype == "fp64" else torch.float32
    assert routing.probs_TK.dtype == wide
    logits_TE = hidden_TD.detach().bfloat16().to(wide) @ router.weight.to(wide).T
    _, probs_TK = expected_routing(logits_TE, router.model, None)
    tolerance = 1e-12 if dtype == "fp64" else 1e-5
    torch.testing.assert_close(routing.probs_TK[:11].double(), probs_TK[:11], rtol=tolerance, atol=0)


def reference_step(router: RingRouter, batches, into: list[Tensor], scale: float) -> Tensor:
    """sum over microbatches of <weights, into> + scale * n_m * (a_b B_m + a_z Z_m), for plain autograd."""
    model = router.model
    a_balance, a_z = model.moe_aux_loss_coeff, model.moe_z_loss_coeff
    total = torch.zeros((), dtype=torch.float64)
    for (hidden_TD, packed), into_TK in zip(batches, into, strict=True):
        logits_TE = (hidden_TD @ router.weight.T)[packed.valid_T]
        n = len(logits_TE)
        sigmoid = model.moe_router_score_function == "sigmoid"
        scores_TE = torch.sigmoid(logits_TE) if sigmoid else logits_TE.softmax(1)
        experts_TK, _ = expected_routing(logits_TE.detach(), model, router.expert_bias)
        chosen_TK = scores_TE.gather(1, experts_TK)
        if model.moe_router_topk > 1:
            chosen_TK = chosen_TK / chosen_TK.sum(1, keepdim=True)
        weights_TK = model.moe_router_topk_scaling_factor * chosen_TK
        share_E = torch.bincount(experts_TK.flatten(), minlength=E) / experts_TK.numel()
        mean_E = (scores_TE / scores_TE.sum(1, keepdim=True)).mean(0)
        balance = E * (mean_E * share_E).sum()
        z = logits_TE.logsumexp(1).square().mean()
        total = total + (weights_TK * into_TK[:n]).sum() + scale * n * (a_balance * balance + a_z * z)
    return total


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_of_balance_and_z_loss_are_the_formulas_over_microbatches_of_different_padding(settings):
    router = make_router(**settings, moe_aux_loss_coeff=0.7, moe_z_loss_coeff=0.2)
    N = 11 + 3 + 12
    batches = [
        inputs((7, 4), 13, seed=1, scale=1 / N),
        inputs((3,), 12, seed=2, scale=1 / N),
        inputs((5, 1, 6), 12, seed=3, scale=1 / N),
    ]
    generator = torch.Generator().manual_seed(9)
    shape = (13, settings["moe_router_topk"])
    into = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in batches]
    leaves = [router.weight, *(hidden for hidden, _ in batches)]
    loss = reference_step(router, batches, into, 1 / N)
    expected = torch.autograd.grad(loss, leaves)
    for (hidden_TD, packed), into_TK in zip(batches, into, strict=True):
        routing = router(hidden_TD, packed)
        (routing.probs_TK * into_TK[: len(hidden_TD)])[packed.valid_T].sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        # the coefficients enter the backward pass in fp32
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_padding_enters_nothing(settings):
    """The same tokens with more padding slots, and other rubbish in them: same statistics, same gradients."""
    seen = []
    for slots in (11, 13, 40):
        router = make_router(**settings, moe_aux_loss_coeff=0.7, moe_z_loss_coeff=0.2)
        hidden_TD, packed = inputs(slots=slots)
        real = inputs(slots=11)[0].detach()
        with torch.no_grad():
            hidden_TD[:11] = real
            hidden_TD[11:] *= 100
        routing = router(hidden_TD, packed)
        routing.probs_TK.square().sum().backward()
        assert not hidden_TD.grad[11:].any()
        statistics = [router.load_E, router.balance_sum, router.z_sum]
        seen.append([*statistics, hidden_TD.grad[:11], router.weight.grad, routing.probs_TK[:11]])
    for other in seen[1:]:
        for mine, theirs in zip(other, seen[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_balance_is_1_when_uniform_and_more_when_not():
    router = make_router(**SOFTMAX, moe_aux_loss_coeff=1.0)
    _, packed = inputs((8,), 8)
    with torch.no_grad():
        # token t prefers experts t, t+1, t+2: every expert is chosen as often and as strongly
        router.weight.zero_()
        router.weight.data = (
            torch.stack([torch.eye(E).roll(k, 0) * (4 - k) for k in range(K)]).sum(0).double()
        )
        hidden = torch.eye(E, dtype=torch.float64)
    router(hidden.requires_grad_(), packed)
    assert router.balance_sum.item() / 8 == pytest.approx(1.0, abs=1e-12)
    router.clear_statistics()
    router(torch.eye(E, dtype=torch.float64)[:1].expand(8, E).requires_grad_(), packed)
    assert router.balance_sum.item() / 8 > 2


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_one_expert_per_token_teaches_the_router_without_any_balance_loss(score_function):
    """A weight of 1 would be a constant: no gradient would reach the router from what the experts say."""
    router = make_router(**SETTINGS[f"{score_function}-top-1"])
    hidden_TD, packed = inputs()
    routing = router(hidden_TD, packed)
    routing.probs_TK.sum().backward()
    visited_E = routing.counts_E > 0
    assert 1 < visited_E.sum() < E
    learning_E = router.weight.grad.abs().sum(1) > 1e-6
    # softmax reaches every logit, sigmoid the chosen expert's alone
    assert torch.equal(learning_E, visited_E if score_function == "sigmoid" else torch.ones(E) > 0)
    assert (hidden_TD.grad[:11].abs().sum(1) > 1e-6).all()


def test_frozen_router_learns_nothing_but_passes_gradients_on():
    router = make_router(**SIGMOID, freeze_moe_router=True, moe_aux_loss_coeff=0.7)
    hidden_TD, packed = inputs()
    before = router.expert_bias.clone()
    router(hidden_TD, packed).probs_TK.square().sum().backward()
    router.update_after_step(router.load_E, router.logit_moments)
    assert router.weight.grad is None
    assert hidden_TD.grad[:11].abs().sum() > 0
    assert torch.equal(router.expert_bias, before)


@pytest.mark.parametrize("settings", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_replay_visits_the_recorded_experts_and_gradients_still_flow(settings):
    router = make_router(**settings)
    recorded_TK = torch.stack([torch.randperm(E)[:K] for _ in range(13)])
    other_layer = torch.full_like(recorded_TK, 1)
    hidden_TD, packed = inputs(routes=torch.stack([recorded_TK, other_layer]))
    routing = router(hidden_TD, packed)
    assert torch.equal(routing.experts_TK[:11], recorded_TK[:11])
    logits_TE = hidden_TD @ router.weight.T
    sigmoid = router.model.moe_router_score_function == "sigmoid"
    scores_TK = (logits_TE.sigmoid() if sigmoid else logits_TE.softmax(1)).gather(1, recorded_TK)
    expected_TK = router.model.moe_router_topk_scaling_factor * scores_TK / scores_TK.sum(1, keepdim=True)
    torch.testing.assert_close(routing.probs_TK[:11], expected_TK[:11])
    into_TK = torch.randn(11, K, dtype=torch.float64)
    wanted = torch.autograd.grad((expected_TK[:11] * into_TK).sum(), [router.weight, hidden_TD])
    (routing.probs_TK[:11] * into_TK).sum().backward()
    torch.testing.assert_close(router.weight.grad, wanted[0])
    torch.testing.assert_close(hidden_TD.grad, wanted[1])
    assert router.weight.grad.abs().max() > 1e-3


def warm_router() -> RingRouter:
    router = make_router(**SOFTMAX, moe_router_warmup_iters=10)
    router.logit_mean.fill_(0.4)
    router.logit_std.fill_(1.7)
    return router


def test_warm_up_starts_with_pure_noise_and_ends_with_the_true_logits():
    router = warm_router()
    torch.manual_seed(3)
    first = router(*inputs(seed=1, warmup=0.0))
    torch.manual_seed(3)
    second = router(*inputs(seed=2, warmup=0.0))
    assert torch.equal(first.experts_TK, second.experts_TK) and torch.equal(first.probs_TK, second.probs_TK)
    torch.manual_seed(3)
    noise_TE = 0.4 + 1.7 * torch.randn(13, E, dtype=torch.float64)
    torch.testing.assert_close(first.probs_TK[:11], expected_routing(noise_TE, router.model, None)[1][:11])
    state = torch.get_rng_state()
    ended = router(*inputs(seed=1, warmup=1.0))
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(ended.probs_TK, router(*inputs(seed=1, scale=None)).probs_TK)


def test_half_way_the_logits_are_half_true():
    router = warm_router()
    hidden_TD, packed = inputs(warmup=0.5)
    torch.manual_seed(3)
    routing = router(hidden_TD, packed)
    torch.manual_seed(3)
    noise_TE = 0.4 + 1.7 * torch.randn(13, E, dtype=torch.float64)
    logits_TE = 0.5 * (hidden_TD @ router.weight.T) + 0.5 * noise_TE
    torch.testing.assert_close(routing.probs_TK[:11], expected_routing(logits_TE, router.model, None)[1][:11])


def test_running_statistics_are_those_of_the_true_logits_of_valid_tokens():
    router = warm_router()
    batches = [inputs((7, 4), 13, seed=1, warmup=0.0), inputs((3,), 12, seed=2, warmup=0.0)]
    for batch in batches:
        router(*batch)
    kept = torch.cat(
        [(hidden @ router.weight.T)[packed.valid_T].detach().flatten() for hidden, packed in batches]
    )
    assert router.logit_moments[0] == kept.numel()
    router.update_after_step(router.load_E, router.logit_moments)
    assert router.logit_mean.item() == pytest.approx(0.9 * 0.4 + 0.1 * kept.mean().item(), rel=1e-5)
    assert router.logit_std.item() == pytest.approx(0.9 * 1.7 + 0.1 * kept.std(correction=0).item(), rel=1e-5)


def test_what_stands_in_padding_does_not_reach_the_running_statistics():
    """Nor does a step without a valid token move them."""
    router = warm_router()
    hidden_TD, packed = inputs(warmup=0.5)
    router(hidden_TD, packed)
    expected = router.logit_moments.clone()
    router.clear_statistics()
    dirty_TD = hidden_TD.detach().clone()
    dirty_TD[~packed.valid_T] = float("nan")
    router(dirty_TD.requires_grad_(), packed)
    assert torch.equal(router.logit_moments, expected)
    before = router.logit_mean.clone(), router.logit_std.clone()
    router.update_after_step(router.load_E, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(router.logit_mean, before[0]) and torch.equal(router.logit_std, before[1])


def test_statistics_stand_still_outside_training():
    router = warm_router()
    for mode, grad, scale in ((False, True, 0.1), (True, False, 0.1), (True, True, None)):
        router.train(mode)
        with torch.set_grad_enabled(grad):
            router(*inputs(scale=scale, warmup=0.5))
    for buffer in (router.load_E, router.balance_sum, router.z_sum, router.logit_moments):
        assert not buffer.any()


def test_the_expert_bias_moves_towards_balance_by_its_rate():
    router = make_router(**SIGMOID, moe_router_bias_update_rate=0.01)
    before = router.expert_bias.clone()
    load_E = torch.tensor([0, 9, 3, 3, 3, 3, 3, 0], dtype=torch.float64)
    router.update_after_step(load_E, router.logit_moments)
    moved = (router.expert_bias - before).tolist()
    assert moved == pytest.approx([0.01, -0.01, 0, 0, 0, 0, 0, 0.01], abs=1e-7)
