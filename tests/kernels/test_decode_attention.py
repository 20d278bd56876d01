"""decode_attention: every backend against fp64 maths written out per token, and what it leaves in the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ring.kernels import HeadNorms, decode_attention
from tests.helpers.kernels.backends import INTERPRETED, relative_error, run_in_the_interpreter

SLOTS, LENGTH = 5, 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected(mixed, rotary, keys, values, rows, positions, scale, norms):
    """Token by token and head by head in fp64; returns context, and key and value of every token."""
    T, G, M, C = mixed.shape
    half = rotary.shape[-1]
    wide = mixed.double()

    def ready(x, weight, t):
        if weight is not None:
            x = x / (x.square().mean() + norms.eps).sqrt() * weight.double()
        cos, sin = rotary[0, t].double(), rotary[1, t].double()
        a, b = x[:half], x[half : 2 * half]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[2 * half :]))

    q_weight, k_weight = (norms.q_weight_C, norms.k_weight_C) if norms else (None, None)
    context = torch.zeros(T, G, M - 2, C, dtype=torch.float64)
    new_k, new_v = torch.zeros(T, G, C).double(), wide[:, :, M - 1]
    for t in range(T):
        row, position = int(rows[t]), int(positions[t])
        for g in range(G):
            new_k[t, g] = ready(wide[t, g, M - 2], k_weight, t)
            k = torch.cat((keys[row, :position, g].double(), new_k[t, g][None]))
            v = torch.cat((values[row, :position, g].double(), new_v[t, g][None]))
            for r in range(M - 2):
                weights = (k @ ready(wide[t, g, r], q_weight, t) * scale).softmax(0)
                context[t, g, r] = weights @ v
    return context.flatten(1, 2), new_k, new_v


def check(T=4, G=2, R=3, C=16, half=8, normed=False, dtype=torch.float32, tolerance=1e-5, spread=1):
    mixed = random(T, G, R + 2, C)
    mixed[:, :, :R] *= spread
    mixed = mixed.to(dtype)
    angles = random(T, half, seed=1) * 3
    rotary = torch.stack((angles.cos(), angles.sin()))
    keys, values = (random(SLOTS, LENGTH, G, C, seed=seed).to(dtype) for seed in (2, 3))
    rows = torch.tensor([3, 0, 4, 2, 1])[:T]
    positions = torch.tensor([0, 1, LENGTH - 1, 17, 16])[:T]
    norms = HeadNorms(random(C, seed=4).to(dtype), random(C, seed=5).to(dtype), 1e-3) if normed else None
    want, new_k, new_v = expected(mixed, rotary, keys, values, rows, positions, C**-0.5, norms)
    kept_k, kept_v = keys.clone(), values.clone()
    # what lies beyond a sequence's end is never read
    for t in range(T):
        keys[rows[t], positions[t] + 1 :] = 1e4
    got = decode_attention(mixed, rotary, keys, values, rows, positions, C**-0.5, norms)
    assert got.dtype == dtype and got.shape == (T, G * R, C)
    assert relative_error(got, want) < tolerance
    assert relative_error(keys[rows, positions], new_k) < tolerance
    assert relative_error(values[rows, positions], new_v) < tolerance
    for t in range(T):
        assert torch.equal(keys[rows[t], : positions[t]], kept_k[rows[t], : positions[t]])
        kept_v[rows[t], positions[t]] = values[rows[t], positions[t]]
    assert torch.equal(values, kept_v)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_tokens(backend, tokens):
    check(T=tokens)


@pytest.mark.parametrize("channels", [2, 7, 8, 24, 33, 64])
@pytest.mark.parametrize("normed", [False, True])
def test_channels(backend, channels, normed):
    check(T=3, C=channels, half=channels // 2, normed=normed)


@pytest.mark.parametrize(("groups", "repeats"), [(1, 1), (1, 4), (3, 2)])
def test_heads(backend, groups, repeats):
    check(T=3, G=groups, R=repeats)


@pytest.mark.parametrize("half", [0, 3, 8])
def test_part_of_the_channels_is_rotated(backend, half):
    check(T=2, half=half, normed=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-12)]
)
def test_other_dtypes(backend, dtype, tolerance):
    # the angles are fp32 in every dtype
    check(T=3, normed=True, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("repeats", [1, 3])
def test_scores_further_apart_than_exp_reaches(backend, channels, repeats):
    check(T=5, R=repeats, C=channels, spread=1000, tolerance=1e-3)


def test_the_docstring_example_holds(backend):
    mixed = torch.tensor([[[[0.0], [5.0], [3.0]]]])
    keys, values = torch.zeros(1, 2, 1, 1), torch.tensor([[[[1.0]], [[0.0]]]])
    got = decode_attention(
        mixed, torch.zeros(2, 1, 0), keys, values, torch.tensor([0]), torch.tensor([1]), 1.0
    )
    assert got.tolist() == [[[2.0]]]
    assert keys.flatten().tolist() == [0.0, 5.0] and values.flatten().tolist() == [1.0, 3.0]


def test_a_place_outside_the_cache_is_refused_by_the_extension(backend):
    if backend != "native":
        pytest.skip("only the extension checks every place")
    keys = torch.zeros(1, 2, 1, 4)
    for row, position in ((1, 0), (0, 2), (-1, 0), (0, -1)):
        with pytest.raises(RuntimeError, match="outside the cache"):
            decode_attention(
                torch.zeros(1, 1, 3, 4),
                torch.zeros(2, 1, 2),
                keys,
                keys.clone(),
                torch.tensor([row]),
                torch.tensor([position]),
                1.0,
            )


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")
