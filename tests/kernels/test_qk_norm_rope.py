"""qk_norm_rope: every backend against fp64 maths written with complex numbers, gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_ring.kernels import HeadNorms, dispatch, qk_norm_rope
from tests.helpers.kernels.backends import INTERPRETED, relative_error, run_in_the_interpreter

EPSILON = 1e-3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(tokens: int, half: int) -> Tensor:
    turns = random(tokens, half, seed=1) * 3
    return torch.stack((turns.cos(), turns.sin()))


def expected(mixed: Tensor, rotary: Tensor, weights: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    """Each head as a row of complex numbers times exp(i angle), after its norm."""
    half = rotary.shape[-1]
    turn = torch.complex(rotary[0].double(), rotary[1].double())[:, None, None]

    def ready(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)

    q_weight, k_weight = weights or (None, None)
    q, k, v = mixed[:, :, :-2], mixed[:, :, -2:-1], mixed[:, :, -1]
    return ready(q, q_weight).flatten(1, 2), ready(k, k_weight).squeeze(2), v


def check(T=4, G=2, R=3, C=16, half=8, normed=True, dtype=torch.float32, tolerance=1e-5):
    mixed, rotary = random(T, G, R + 2, C).to(dtype), angles(T, half)
    weights = [random(C, seed=seed).to(dtype) for seed in (2, 3)] if normed else []
    leaves = [x.clone().requires_grad_() for x in (mixed, *weights)]
    wide = [x.double().requires_grad_() for x in (mixed, *weights)]
    got = qk_norm_rope(leaves[0], rotary, HeadNorms(leaves[1], leaves[2], EPSILON) if normed else None)
    want = expected(wide[0], rotary, (wide[1], wide[2]) if normed else None)
    seeds = [random(*x.shape, seed=4 + n).to(dtype) for n, x in enumerate(want)]
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert relative_error(mine, theirs) < tolerance
    wanted = torch.autograd.grad(want, wide, [seed.double() for seed in seeds])
    for mine, theirs in zip(torch.autograd.grad(got, leaves, seeds), wanted, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, theirs) < tolerance


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("normed", [True, False])
def test_tokens(backend, tokens, normed):
    check(T=tokens, normed=normed)


@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (3, 1), (1, 4), (2, 6)])
def test_groups_and_heads(backend, groups, heads):
    check(G=groups, R=heads)


@pytest.mark.parametrize(
    ("channels", "half"), [(2, 1), (6, 3), (15, 7), (17, 8), (18, 9), (64, 32), (40, 0), (33, 4)]
)
@pytest.mark.parametrize("normed", [True, False])
def test_channels_rotated_and_not(backend, channels, half, normed):
    check(C=channels, half=half, normed=normed)


@pytest.mark.parametrize(("tokens", "groups"), [(65, 2), (49, 3)])
def test_more_items_than_parts(backend, tokens, groups, monkeypatch):
    """Partial sums of the weights' gradients hold several items each."""
    if backend == "triton":
        from megatron_ring.kernels.qk_norm_rope import kernel

        monkeypatch.setattr(kernel, "PARTS", 48)
    check(T=tokens, G=groups, R=1, C=2, half=1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
def test_other_dtypes(backend, dtype, tolerance):
    check(dtype=dtype, tolerance=tolerance)
    check(dtype=dtype, tolerance=tolerance, normed=False, half=5)


def test_without_gradients_it_is_the_same(backend):
    mixed, rotary = random(5, 2, 5, 16).transpose(0, 1).contiguous().transpose(0, 1), angles(5, 8)
    norms = HeadNorms(random(16, seed=2), random(16, seed=3), EPSILON)
    assert not mixed.is_contiguous()
    with torch.no_grad():
        plain = qk_norm_rope(mixed, rotary, norms)
    for mine, theirs in zip(plain, qk_norm_rope(mixed, rotary, norms), strict=True):
        assert torch.equal(mine, theirs)


def test_the_docstring_example_holds(backend):
    mixed = torch.tensor([[[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]])
    q, k, v = qk_norm_rope(mixed, torch.tensor([[[0.0]], [[1.0]]]))
    assert (q.tolist(), k.tolist(), v.tolist()) == ([[[-2.0, 1.0]]], [[[-4.0, 3.0]]], [[[5.0, 6.0]]])


@pytest.mark.skipif(not dispatch.native_is_available(), reason="megatron_ring._C is not built")
@pytest.mark.parametrize("half", [2, 3])
def test_gradcheck_of_the_extension(half):
    leaves = [x.double().requires_grad_() for x in (random(3, 2, 4, 7), random(7, seed=2), random(7, seed=3))]
    rotary = angles(3, half)
    with dispatch.force("native"):
        assert gradcheck(lambda x, q, k: qk_norm_rope(x, rotary, HeadNorms(q, k, EPSILON)), leaves)
        assert gradcheck(lambda x: qk_norm_rope(x, rotary), leaves[0])


@pytest.mark.skipif(not dispatch.native_is_available(), reason="megatron_ring._C is not built")
def test_the_extension_refuses_angles_of_other_tokens():
    with dispatch.force("native"), pytest.raises(RuntimeError, match="cos and sin"):
        qk_norm_rope(random(3, 2, 4, 8), angles(2, 4))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")
