"""The maps: each is a one-to-one correspondence of numbers, and the interleave is Megatron's."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.checkpoint.convert.model_map import tensor_map
from megatron_ring.checkpoint.convert.publish import Assembler, Part, Shard, hf_parts
from megatron_ring.checkpoint.convert.tensor_map import Box, MapBuilder, TensorMap
from tests.helpers.checkpoint.convert_cases import ODD


def filled(mapping: TensorMap) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Per key and per name, how many correspondences cover each element."""
    keys = {key: torch.zeros(shape) for key, shape in mapping.keys.items()}
    names = {name: torch.zeros(shape) for name, shape in mapping.names.items()}
    for pair in mapping.pairs:
        keys[pair.key][pair.key_box.slices()] += 1
        names[pair.name][pair.name_box.slices()] += 1
        assert pair.key_box.size == pair.name_box.size
    return keys, names


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("padding", [0, 7])
def test_a_map_covers_both_sides_exactly_once(name: str, padding: int):
    model = ODD[name]
    keys, names = filled(tensor_map(model, model.vocab_size + padding))
    assert all((counts == 1).all() for counts in names.values())
    for key, counts in keys.items():
        real = (
            counts[: model.vocab_size]
            if key in ("embedding.word_embeddings.weight", "output_layer.weight")
            else counts
        )
        assert (real == 1).all(), key
        assert counts.sum() == real.sum(), f"{key}: padding is covered"


def test_queries_keys_and_values_interleave_per_group():
    b = MapBuilder()
    b.interleave_qkv("key", ("name",), 4, 2, 1)
    mapping = b.build()
    # two groups of two query heads: rows are q0 q1 k0 v0 q2 q3 k1 v1
    data = torch.arange(8.0)
    shards = [Shard("key", (8,), (0,), torch.tensor([0.0, 1, 4, 6, 2, 3, 5, 7]))]
    assembler = Assembler(mapping)
    whole = [t for t in (assembler.add(part) for part in hf_parts(mapping, shards)) if t is not None]
    assert len(whole) == 1 and torch.equal(whole[0], data)


def test_transformer_engine_keeps_norms_inside_linears():
    mapping = tensor_map(dataclasses.replace(ODD["v2"], transformer_impl="transformer_engine"), 101)
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in mapping.keys
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in mapping.keys
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in mapping.keys
    assert not any(key.endswith("input_layernorm.weight") for key in mapping.keys)


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 36), max_size=3), lead=st.integers(0, 2), name=st.sampled_from(sorted(ODD))
)
def test_any_cut_of_the_shards_gives_the_same_tensors(cuts: list[int], lead: int, name: str):
    model = ODD[name]
    mapping = tensor_map(model, model.vocab_size + 3)
    generator = torch.Generator().manual_seed(1)
    whole = {key: torch.randn(shape, generator=generator) for key, shape in mapping.keys.items()}
    expected = assemble(mapping, [Shard(k, tuple(x.shape), (0,) * x.dim(), x) for k, x in whole.items()])
    shards = []
    for key, x in whole.items():
        axis = min(lead, x.dim() - 1)
        borders = sorted({0, x.shape[axis], *(cut % x.shape[axis] for cut in cuts)})
        for start, stop in itertools.pairwise(borders):
            offset = tuple(start if i == axis else 0 for i in range(x.dim()))
            shards.append(Shard(key, tuple(x.shape), offset, x.narrow(axis, start, stop - start)))
    # a replica of every other shard, as data-parallel ranks have
    found = assemble(mapping, [*shards, *shards[::2]])
    assert found.keys() == expected.keys() == mapping.names.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)


def assemble(mapping: TensorMap, shards: list[Shard]) -> dict[str, torch.Tensor]:
    assembler = Assembler(mapping)
    whole = {}
    for part in hf_parts(mapping, shards):
        tensor = assembler.add(part)
        if tensor is not None:
            assert part.name not in whole
            whole[part.name] = tensor
    assert assembler.missing() == []
    return whole


def test_an_incomplete_tensor_is_named():
    b = MapBuilder()
    b.rename("key", "name", 4)
    assembler = Assembler(b.build())
    assert assembler.add(Part("name", Box((0,), (3,)), torch.zeros(3))) is None
    assert assembler.missing() == ["name"]
