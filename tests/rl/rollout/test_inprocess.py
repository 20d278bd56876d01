"""The in-process engine: what it decodes is what the training model says, however it is batched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ring.errors import RolloutError
from megatron_ring.rl.rollout.inprocess import InProcessEngine
from megatron_ring.rl.rollout.protocol import Request, RolloutBudget
from tests.helpers.model.small import small_engine
from tests.helpers.rl.sequences import assert_same, by_key, requests, sampling, scored


@contextmanager
def small_rollout(
    model: str, slots: int = 64, model_settings: dict | None = None, **settings
) -> Iterator[InProcessEngine]:
    torch.set_num_threads(1)
    with small_engine(model, **(model_settings or {})) as engine:
        rollout = InProcessEngine(engine, slots=slots, **settings)
        rollout.publish(5)
        yield rollout
        rollout.close()


def run(rollout: InProcessEngine, asked, params, **options):
    return by_key(list(rollout.generate(asked, params, **options)))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("v1", {}),
        ("v2", {}),
        ("v2_mtp", {}),
        ("dense", {}),
        ("v1", {"moe_router_topk": 1}),
        ("v2", {"moe_router_topk": 1}),
    ],
)
def test_decoding_says_what_the_training_model_says(model, settings):
    with small_rollout(model, model_settings=settings) as rollout:
        greedy = run(rollout, requests(), sampling(temperature=0))
        sampled = run(rollout, requests(), sampling(temperature=0.7))
        for request in requests():
            key = (request.prompt.uid, request.sample)
            logp_R, best_R = scored(rollout.engine, request, greedy[key])
            assert greedy[key].tokens_R.tolist() == best_R.tolist()
            np.testing.assert_allclose(greedy[key].logprobs_R, logp_R, atol=1e-5)
            logp_R, _ = scored(rollout.engine, request, sampled[key], 0.7)
            np.testing.assert_allclose(sampled[key].logprobs_R, logp_R, atol=1e-5)
            assert sampled[key].versions_R.tolist() == [5] * 12
            assert sampled[key].stop == "length"
        assert any(greedy[key].tokens_R.tolist() != sampled[key].tokens_R.tolist() for key in greedy)


@pytest.mark.parametrize("slots", [1, 3, 5])
@pytest.mark.parametrize("prefill_tokens", [1, 40])
def test_a_response_does_not_depend_on_slots_and_batches(slots, prefill_tokens):
    asked = requests(samples=2)
    # different ends, so that slots are taken over one by one
    params = sampling(20, stop_ids=tuple(range(0, 250, 9)))
    with small_rollout("v2") as rollout:
        whole = run(rollout, asked, params)
    with small_rollout("v2", slots=slots, prefill_tokens=prefill_tokens) as rollout:
        parts = run(rollout, asked, params)
    assert whole.keys() == parts.keys() and len(whole) == 16
    assert len({response.length for response in whole.values()}) > 3
    assert {response.stop for response in whole.values()} == {"eos", "length"}
    for key, response in whole.items():
        assert_same(parts[key], response)


@pytest.mark.parametrize(("slots", "prefill_tokens"), [(1, 1), (5, 40), (64, 8192)])
def test_what_a_budget_leaves_does_not_depend_on_slots_and_batches(slots, prefill_tokens):
    params = sampling(20, stop_ids=tuple(range(0, 250, 9)), record_routes=True)
    options = {"budget": RolloutBudget(tokens=90, concurrency=6)}
    with small_rollout("v2") as rollout:
        expected = list(rollout.generate(requests(samples=2), params, **options))
    with small_rollout("v2", slots=slots, prefill_tokens=prefill_tokens) as rollout:
        found = list(rollout.generate(requests(samples=2)[::-1], params, **options))
        assert rollout.cache.num_slots == 6, "a process holds what is admitted"
    assert 90 <= sum(response.length for response in expected) < 96
    states = [response.stop for response in expected]
    assert {"eos", "unfinished"} <= set(states) and states == sorted(states, key="unfinished".__eq__)
    ended = states.index("unfinished")
    assert [r.key for r in found[:ended]] == [r.key for r in expected[:ended]]
    theirs = by_key(found)
    for response in expected:
        assert_same(theirs[response.key], response)
        if response.length:
            assert np.array_equal(theirs[response.key].routes_SLK, response.routes_SLK)


def test_a_stop_token_is_kept_and_is_the_last():
    stop_ids = tuple(range(0, 250, 9))
    with small_rollout("v1") as rollout:
        for response in rollout.generate(requests(samples=3), sampling(30, stop_ids=stop_ids)):
            stops = [token in stop_ids for token in response.tokens_R.tolist()]
            assert stops.index(True) == len(stops) - 1 if response.stop == "eos" else not any(stops)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_going_on_from_a_prefix_is_an_uninterrupted_run(temperature):
    params = sampling(14, temperature=temperature, record_routes=True)
    asked = requests()
    with small_rollout("v2", slots=4) as rollout:
        whole = run(rollout, asked, params)
        parts = run(rollout, asked, params, budget=RolloutBudget(tokens=50, concurrency=3))
        assert 50 <= sum(r.length for r in parts.values()) < 53
        states = [response.stop for response in parts.values()]
        assert states == sorted(states, key=lambda stop: stop == "unfinished") and "length" in states
        assert any(r.length == 0 for r in parts.values())
        rollout.publish(6)
        again = [
            Request(prompt=r.prompt, sample=r.sample, prefix=parts[r.prompt.uid, r.sample]) for r in asked
        ]
        rest = run(rollout, again, params)
    for key, response in whole.items():
        assert_same(rest[key], response)
        cut = parts[key].length
        assert rest[key].versions_R.tolist() == [5] * cut + [6] * (14 - cut)
        assert np.array_equal(rest[key].routes_SLK, response.routes_SLK)


def test_a_carried_token_keeps_its_old_log_p_and_route():
    params = sampling(8, record_routes=True)
    (asked,) = requests((6,))
    with small_rollout("v1") as rollout:
        (part,) = rollout.generate([asked], params, budget=RolloutBudget(tokens=3, concurrency=1))
        marked = replace(part, logprobs_R=part.logprobs_R - 1, routes_SLK=part.routes_SLK * 0 + 7)
        (whole,) = rollout.generate([replace(asked, prefix=marked)], params)
    assert whole.logprobs_R[:3].tolist() == marked.logprobs_R.tolist()
    assert (whole.routes_SLK[:8] == 7).all() and not (whole.routes_SLK[8:] == 7).all()


def test_routes_are_the_routers_choices():
    """Replaying them changes nothing: they are the ones that the scoring pass makes itself."""
    with small_rollout("v2") as rollout:
        answers = run(rollout, requests(), sampling(record_routes=True))
        model = rollout.engine.config.model
        moe_layers = model.num_layers - model.first_k_dense_replace
        seen: list[torch.Tensor] = []
        for router in rollout.engine.routers:
            router.register_forward_hook(lambda *call: seen.append(call[2].experts_TK))
        for request in requests():
            response = answers[request.prompt.uid, 0]
            seen.clear()
            scored(rollout.engine, request, response)
            read = len(request.prompt.tokens) + response.length - 1
            assert response.routes_SLK.shape == (read, moe_layers, model.moe_router_topk)
            assert response.routes_SLK.dtype == np.int16
            expected = torch.stack(seen[:moe_layers], 1)[:read]
            assert np.array_equal(response.routes_SLK, expected.numpy())


def test_new_weights_change_what_is_said():
    with small_rollout("v1") as rollout:
        before = run(rollout, requests(), sampling(temperature=0))
        with torch.no_grad():
            for parameter in rollout.engine.models[0].output_layer.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        rollout.publish(6)
        after = run(rollout, requests(), sampling(temperature=0))
        for request in requests():
            response = after[request.prompt.uid, 0]
            logp_R, best_R = scored(rollout.engine, request, response)
            assert response.tokens_R.tolist() == best_R.tolist()
            np.testing.assert_allclose(response.logprobs_R, logp_R, atol=1e-5)
    assert any(before[key].tokens_R.tolist() != after[key].tokens_R.tolist() for key in before)


def test_nothing_asked_and_nothing_left():
    with small_rollout("dense") as rollout:
        assert list(rollout.generate([], sampling())) == []
        assert list(rollout.generate([], sampling(), budget=RolloutBudget(tokens=5, concurrency=2))) == []
        (one,) = rollout.generate(requests((4,)), sampling(6))
        again = Request(prompt=requests((4,))[0].prompt, sample=0, prefix=replace(one, stop="unfinished"))
        (same,) = rollout.generate([again], sampling(6))
        assert_same(same, one)


def test_responses_come_as_they_finish():
    """The first one ends while the others go on, and the engine has not run ahead of its reader."""
    with small_rollout("dense", slots=2) as rollout:
        stream = rollout.generate(requests((4, 4, 4)), sampling(10, stop_ids=tuple(range(0, 250, 5))))
        first = next(stream)
        assert first.stop in ("eos", "length")
        rest = list(stream)
    assert len(rest) == 2


def test_the_cache_grows_under_what_it_holds():
    """Positions beyond the first allocation, and a second call with more slots."""
    with small_rollout("v2", slots=8) as rollout:
        run(rollout, requests((3,)), sampling(5))
        small = rollout.cache.length
        asked = requests((40, 7))
        answers = run(rollout, asked, sampling(2 * small, temperature=0))
        assert rollout.cache.length > 2 * small and rollout.cache.num_slots == 2
        for request in asked:
            response = answers[request.prompt.uid, 0]
            logp_R, best_R = scored(rollout.engine, request, response)
            assert response.tokens_R.tolist() == best_R.tolist()
            np.testing.assert_allclose(response.logprobs_R, logp_R, atol=1e-5)


def test_a_closed_iterator_leaves_the_head_as_training_needs_it():
    with small_rollout("v1", slots=1) as rollout:
        head = rollout.engine.models[0].output_layer
        stream = rollout.generate(requests((4, 4)), sampling(3))
        next(stream)
        assert head.held_inverse_D is not None
        stream.close()
        assert head.held_inverse_D is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 4}])
def test_weights_that_are_not_finite_end_in_one_line(bad, settings):
    with small_rollout("dense") as rollout:
        with torch.no_grad():
            next(rollout.engine.models[0].output_layer.parameters())[3].fill_(bad)
        rollout.publish(7)
        answers = rollout.generate(requests((4, 6, 5)), sampling(**settings))
        with pytest.raises(
            RolloutError, match=r"^logits of 3 sequences are not finite at policy version 7.*--lr$"
        ):
            next(answers)
        assert getattr(rollout.engine.models[0].output_layer, "held_inverse_D", None) is None


def test_a_pass_of_decoding_is_one_copy_to_the_device_and_one_back(monkeypatch: pytest.MonkeyPatch):
    """Each is a wait of its own; here they are counted where they are asked for."""
    counted = {"to": 0, "back": 0}
    to_torch, to_host = torch.from_numpy, torch.Tensor.cpu

    def there(array: np.ndarray) -> torch.Tensor:
        counted["to"] += 1
        return to_torch(array)

    def back(tensor: torch.Tensor) -> torch.Tensor:
        counted["back"] += 1
        return to_host(tensor)

    with small_rollout("v1") as rollout:
        monkeypatch.setattr(torch, "from_numpy", there)
        monkeypatch.setattr(torch.Tensor, "cpu", back)
        seen = []
        for length in (4, 9):
            counted.update(to=0, back=0)
            run(rollout, requests(), sampling(length))
            seen.append(dict(counted))
    # five passes more
    assert {name: seen[1][name] - seen[0][name] for name in counted} == {"to": 5, "back": 5}
