"""One seed is one model: drawn by name, with the right spread, the same in every shard of every layout."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from tests.helpers.model.small import config_of, weights

STD = 0.08


def fresh_weights(seed: int, model: str = "v2_mtp", **settings) -> dict[str, torch.Tensor]:
    config = config_of(model, seed=seed, init_method_std=STD, **settings)
    # the session's own seed must not matter
    with open_session(config.parallel, seed=torch.randint(1000, ()).item()) as session:
        return weights(Engine(config, session))


@pytest.fixture(scope="module")
def drawn() -> dict[str, torch.Tensor]:
    return fresh_weights(3)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(drawn):
    again, other = fresh_weights(3), fresh_weights(4)
    assert drawn.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in drawn.items())
    matrices = {name for name, value in drawn.items() if value.dim() > 1}
    assert {name for name, value in drawn.items() if not torch.equal(value, other[name])} == matrices


def test_weights_have_the_spread_of_their_kind(drawn):
    layers = 4
    for name, value in drawn.items():
        if "norm" in name and value.dim() == 1:
            assert (value == 1).all(), name
        elif value.dim() == 1:
            assert not value.any(), name
        else:
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight", "fc2_weight"))
            std = STD / math.sqrt(2 * layers) if residual else STD
            real = value[:250] if "embedding" in name or "output_layer" in name else value
            assert real.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * real.numel())), name
            assert abs(real.mean().item()) < 6 * std / math.sqrt(real.numel()), name


def test_rows_past_the_vocabulary_are_zero(drawn):
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert drawn[name].shape[0] == 256
        assert not drawn[name][250:].any() and drawn[name][:250].any(1).all()


def test_no_two_tensors_or_experts_are_alike(drawn):
    rows = [
        (f"{name}[{index}]", part.flatten()[:20])
        for name, value in drawn.items()
        if value.dim() > 1
        for index, part in enumerate(value if ".experts." in name else [value])
    ]
    for i, (name, row) in enumerate(rows):
        for other_name, other in rows[:i]:
            assert not torch.equal(row, other), (name, other_name)


def test_the_padding_of_the_vocabulary_changes_no_weight(drawn):
    wide = fresh_weights(3, make_vocab_size_divisible_by=64)
    assert wide["output_layer.weight"].shape[0] == 256
    wider = fresh_weights(3, make_vocab_size_divisible_by=512)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert torch.equal(wider[name][:250], drawn[name][:250])


def test_tied_embeddings_are_one_tensor_and_drawn_as_the_embedding_is():
    tied, untied = (
        fresh_weights(3, "qwen3"),
        fresh_weights(3, "qwen3", untie_embeddings_and_output_weights=True),
    )
    head = untied.pop("output_layer.weight")
    assert untied.keys() == tied.keys()
    assert all(torch.equal(value, untied[name]) for name, value in tied.items())
    assert not torch.equal(head, tied["embedding.word_embeddings.weight"])
