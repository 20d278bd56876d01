"""A step's gradient is that of plain loops over unpacked responses, in double precision, weight by weight.

The other side is a forward pass written from the papers on Hugging Face's tensors, which shares nothing with
the model: so packing, columns, objective, denominator, engine and model are proven together.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ring.checkpoint.convert.model_map import tensor_map
from megatron_ring.checkpoint.convert.publish import hf_parts, shards_of
from megatron_ring.checkpoint.state import model_state
from megatron_ring.rl.batch.microbatch import NO_ROUTE, build_microbatch, with_routes
from megatron_ring.rl.learn.objective import metrics
from tests.helpers.checkpoint import reference_model
from tests.helpers.model.small import assert_close, gradients, small_engine
from tests.helpers.rl.policy_cases import (
    NUM_TOKENS,
    PICKS,
    grid,
    plain_loss,
    rollouts,
    with_columns,
)
from tests.helpers.rl.policy_step import FACTS, TEMPERATURE, microbatches_of, objective_of, scored_rollouts

NO_BALANCE = dict(moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0)


def hf_tensors(engine, *, of_gradients: bool) -> dict[str, torch.Tensor]:
    """Every weight, or its accumulated gradient, under its Hugging Face name."""
    parameters = [p for model in engine.models for p in model.parameters()]
    weights = [p.data for p in parameters]
    if of_gradients:
        for parameter in parameters:
            parameter.data = parameter.main_grad.view(parameter.shape)
    out: dict[str, torch.Tensor] = {}
    mapping = tensor_map(engine.config.model, engine.models[0].vocab_size)
    for part in hf_parts(mapping, shards_of(model_state(engine))):
        out.setdefault(part.name, torch.zeros(mapping.names[part.name], dtype=torch.float64))
        out[part.name][part.box.slices()] = part.data.double()
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return out


def hf_config(model) -> dict:
    """What the plain forward pass asks of a config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM" if model.family == "qwen2" else "BailingMoeForCausalLM"],
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "partial_rotary_factor": model.rotary_percent,
        "num_experts": model.num_experts,
        "num_shared_experts": int(model.moe_shared_expert_intermediate_size > 0),
        "first_k_dense_replace": model.first_k_dense_replace,
        "num_experts_per_tok": model.moe_router_topk,
        "score_function": model.moe_router_score_function,
        "n_group": model.moe_router_num_groups,
        "topk_group": model.moe_router_group_topk,
        "routed_scaling_factor": model.moe_router_topk_scaling_factor,
        "norm_head": model.norm_head,
    }


def double_logits_TV(tensors: dict[str, torch.Tensor], config: dict, tokens_T: torch.Tensor) -> torch.Tensor:
    """The plain forward pass in double precision; NormHead's norm is constant, as the papers train it."""
    embedding = "model.embed_tokens" if "Qwen2" in config["architectures"][0] else "model.word_embeddings"
    hidden_TD = tensors[f"{embedding}.weight"][tokens_T]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}
        hidden_TD = reference_model._layer(own, config, hidden_TD, layer)
    hidden_TD = reference_model._rms(hidden_TD, tensors["model.norm.weight"], config)
    head_VD = tensors["lm_head.weight"]
    if config["norm_head"]:
        head_VD = head_VD / (head_VD.detach().norm(dim=0, keepdim=True) + 1e-7)
    return hidden_TD @ head_VD.T


@pytest.mark.parametrize(
    ("model", "name", "settings"),
    [
        ("v1", "c3po", {}),
        ("v2", "c3po", {}),
        ("dense", "c3po", {}),
        ("v1", "gspo", {}),
        ("v1", "c3po", {"moe_router_topk": 1}),
        ("v2", "c3po", {"moe_router_topk": 1}),
    ],
)
def test_the_steps_gradient_is_that_of_plain_loops_in_double_precision(model, name, settings):
    with small_engine(model, **NO_BALANCE, **settings) as engine:
        scored, samples = scored_rollouts(engine)
        objective = objective_of(name)
        report = engine.accumulate(microbatches_of(scored, samples, "holes"), objective)
        own = hf_tensors(engine, of_gradients=True)
        tensors = {n: w.clone().requires_grad_() for n, w in hf_tensors(engine, of_gradients=False).items()}
        said = metrics([report])
        assert 0.02 < said["clip_fraction"] < 0.9 and 0.02 < said["masked_fraction"] < 0.9
        assert said["loss_tokens"] == pytest.approx(NUM_TOKENS)
    config = hf_config(engine.config.model)
    logits = []
    for sample in samples:
        tokens_T = torch.tensor([*sample.prompt.tokens, *sample.response.tokens_R.tolist()])
        logits.append(double_logits_TV(tensors, config, tokens_T[:-1])[len(sample.prompt.tokens) - 1 :])
    loss = plain_loss(
        logits,
        samples,
        scored,
        objective.config,
        temperature=TEMPERATURE,
        token_budget=FACTS.token_budget,
        max_response_length=FACTS.max_response_length,
    )
    loss.backward()
    assert report.loss == pytest.approx(loss.item(), rel=2e-6)
    expected = {n: w.grad for n, w in tensors.items() if w.grad is not None}
    assert expected.keys() >= {n for n in own if "expert_bias" not in n and ".experts." not in n}
    own = {n: g for n, g in own.items() if n in expected}
    assert_close(own, expected, 5e-6)


def test_padding_and_what_carries_no_loss_change_nothing():
    """More padding, another pad token, and a pick's unselected end all leave the gradient as it is."""
    with small_engine("v1", **NO_BALANCE) as engine:
        scored, samples = scored_rollouts(engine)
        objective = objective_of()
        report = engine.accumulate(microbatches_of(scored, samples, "two"), objective)
        expected = gradients(engine)
        cut = samples[4]
        tokens_R = cut.response.tokens_R.copy()
        tokens_R[PICKS[4].stop :] = 7
        samples[4] = replace(cut, response=replace(cut.response, tokens_R=tokens_R))
        again = engine.accumulate(microbatches_of(scored, samples, "two", num_slots=128, pad_id=3), objective)
        assert again.loss == pytest.approx(report.loss, rel=1e-6)
        assert_close(gradients(engine), expected, 2e-6)


def test_packing_and_number_of_microbatches_change_no_gradient():
    with small_engine("v1", **NO_BALANCE) as engine:
        scored, samples = scored_rollouts(engine)
        objective = objective_of()
        engine.accumulate(microbatches_of(scored, samples, "one"), objective)
        expected = gradients(engine)
        for packing in ("two", "four", "holes"):
            engine.accumulate(microbatches_of(scored, samples, packing), objective)
            assert_close(gradients(engine), expected, 3e-6)


def test_half_the_tokens_give_half_of_c3pos_gradient_not_all_of_it():
    """The divisor is Phi: the same microbatches twice give twice the gradient, where a token mean would not."""
    with small_engine("v1", **NO_BALANCE) as engine:
        scored, samples = scored_rollouts(engine)
        parts = microbatches_of(scored, samples, "two")
        for name, factor in (("c3po", 2.0), ("dapo", 1.0)):
            engine.accumulate(parts, objective_of(name))
            once = gradients(engine)
            engine.accumulate([*parts, *parts], objective_of(name))
            assert_close(gradients(engine), {n: factor * g for n, g in once.items()}, 3e-6)


def test_scores_before_the_update_make_the_ratio_1():
    with small_engine("v1", **NO_BALANCE) as engine:
        parts = grid(rollouts(), "holes")
        old = [logp_T for logp_T, _ in engine.score(parts, TEMPERATURE)]
        parts = with_columns(parts, {"old_logp_T": old, "ref_logp_T": old})
        plain = objective_of(mismatch_correction="none", mismatch_low=None, mismatch_high=None)
        said = metrics([engine.accumulate(parts, plain)])
        assert said["ratio"] == pytest.approx(1.0, abs=2e-6)
        assert said["ratio_max"] == pytest.approx(1.0, abs=1e-5)
        assert said["kl"] == pytest.approx(0.0, abs=1e-6)
        assert said["clip_fraction"] == 0


def test_replaying_own_routes_changes_no_bit():
    for model in ("v1", "v2"):
        with small_engine(model) as engine:
            scored, samples = scored_rollouts(engine)
            parts = microbatches_of(scored, samples, "holes")
            plain_scores = engine.score(parts, TEMPERATURE)
            plain = engine.accumulate(parts, objective_of())
            expected = gradients(engine)
            scores, routes = engine.score_with_routes(parts, TEMPERATURE)
            layers, topk = engine.config.model.num_moe_layers, engine.config.model.moe_router_topk
            assert [r.shape for r in routes] == [(layers, 96, topk)] * 4
            replayed = with_routes(parts, routes)
            for one, other, again in zip(
                plain_scores, scores, engine.score(replayed, TEMPERATURE), strict=True
            ):
                assert torch.equal(one[0], other[0]) and torch.equal(one[0], again[0])
            report = engine.accumulate(replayed, objective_of())
            assert report.replay.flip_rates == (0.0,) * layers and report.replay.missing_share == 0
            assert replace(report, replay=None) == plain
            assert all(torch.equal(g, expected[n]) for n, g in gradients(engine).items())


def test_replaying_other_routes_changes_the_loss_and_the_router_still_learns():
    with small_engine("v1", **NO_BALANCE) as engine:
        scored, samples = scored_rollouts(engine)
        parts = microbatches_of(scored, samples, "two")
        plain = engine.accumulate(parts, objective_of())
        _, routes = engine.score_with_routes(parts, TEMPERATURE)
        turned = [torch.where(r >= 8, r, (r + 1) % 8).to(torch.int16) for r in routes]
        for routes_LTK, own_LTK in zip(turned, routes, strict=True):
            # only the second layer is replayed otherwise
            routes_LTK[0], routes_LTK[2:] = own_LTK[0], own_LTK[2:]
        report = engine.accumulate(with_routes(parts, turned), objective_of())
        assert abs(report.loss - plain.loss) > 1e-4 * abs(plain.loss)
        assert report.replay.flip_rates[0] == 0 and report.replay.flip_rates[1] > 0.2
        for name, gradient in gradients(engine).items():
            if "router" in name:
                assert gradient.norm() > 1e-6, f"{name} has no gradient"


def test_unknown_routes_are_chosen_anew_and_counted():
    with small_engine("v1", **NO_BALANCE) as engine:
        scored, samples = scored_rollouts(engine)
        parts = microbatches_of(scored, samples, "two")
        plain = engine.accumulate(parts, objective_of())
        _, routes = engine.score_with_routes(parts, TEMPERATURE)
        routes[0][:, :10] = NO_ROUTE
        report = engine.accumulate(with_routes(parts, routes), objective_of())
        assert report.loss == plain.loss
        assert report.replay.missing_share == pytest.approx(10 / sum(p.num_valid for p in parts))


def test_the_rollout_engines_routes_stand_where_their_tokens_stand():
    """R3: every position that was fed to the engine, by response; padding and responses without are unknown."""
    samples = rollouts()
    picks = PICKS[:2]
    for index in (0,):
        fed = len(samples[index].prompt.tokens) + samples[index].response.length - 1
        routes_SLK = (torch.arange(fed * 4 * 3) % 8).view(fed, 4, 3).numpy().astype("uint8")
        samples[index] = replace(
            samples[index], response=replace(samples[index].response, routes_SLK=routes_SLK)
        )
    packed = build_microbatch(samples, picks, 40, replay_layers=(4, 3))
    fed = len(routes_SLK)
    assert packed.routes_LTK.shape == (4, 40, 3)
    assert (packed.routes_LTK[:, :fed].permute(1, 0, 2).numpy() == routes_SLK).all()
    assert (packed.routes_LTK[:, fed:] == NO_ROUTE).all()
    with pytest.raises(ValueError, match="layers and experts"):
        build_microbatch(samples, picks, 40, replay_layers=(3, 3))


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "moe")},
    ],
    ids=["full", "selective"],
)
def test_replay_and_loss_survive_recomputation(recompute):
    results = []
    for settings in ({}, recompute):
        with small_engine("v1", **NO_BALANCE, **settings) as engine:
            scored, samples = scored_rollouts(engine)
            parts = microbatches_of(scored, samples, "two")
            _, routes = engine.score_with_routes(parts, TEMPERATURE)
            turned = [torch.where(r >= 8, r, (r + 1) % 8).to(torch.int16) for r in routes]
            report = engine.accumulate(with_routes(parts, turned), objective_of())
            results.append((report.loss, report.replay, gradients(engine)))
    assert results[0][:2] == results[1][:2]
    assert_close(results[1][2], results[0][2], 1e-6)


@pytest.mark.parametrize(("coefficient", "most"), [(0.02, 3.0), (1e-5, 2e-3)], ids=["large", "the paper's"])
def test_packing_enters_through_the_balance_loss_alone_and_in_proportion(coefficient, most):
    """Its statistics are a microbatch's, so another packing of so few tokens gives quite other ones."""
    with small_engine("v1", moe_aux_loss_coeff=coefficient, moe_z_loss_coeff=1e-3) as engine:
        scored, samples = scored_rollouts(engine)
        found = []
        for packing in ("one", "four"):
            engine.accumulate(microbatches_of(scored, samples, packing), objective_of())
            found.append(gradients(engine))
        one, four = ({n: g for n, g in of.items() if "router" in n} for of in found)
        gap = max(float((one[n] - four[n]).norm() / one[n].norm()) for n in one)
        assert gap < most
        if coefficient > 1e-3:
            assert gap > 0.1, "or the limit that README states is none"
