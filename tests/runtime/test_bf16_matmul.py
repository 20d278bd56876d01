"""bfloat16 products in fp32: rounded once, everything else as it was, and nothing left behind."""

import pytest
import torch

from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.kernels import dispatch
from megatron_ring.runtime import bf16_matmul
from megatron_ring.runtime.session import open_session

pytestmark = pytest.mark.skipif(not dispatch.native_is_available(), reason="megatron_ring._C is not built")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def replaced() -> list[str]:
    """The products that are ours now, by torch's own account: rounded results often agree with torch's."""
    names = ("mm", "mm.out", "bmm", "bmm.out", "addmm", "addmm.out", "addmm_")
    return [name for name in names if "wide_products.cpp" in torch._C._dispatch_dump(f"aten::{name}")]


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(bf16_matmul, "has_bf16_products", lambda: False)
    with bf16_matmul.bf16_products():
        assert len(replaced()) == 7
        yield
    assert not replaced()


def once(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 5), (3, 0, 5), (1, 1, 1), (7, 130, 33)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_those_of_fp32_rounded_once(wide, m, k, n, transposed):
    a = random(k, m).t() if transposed else random(m, k)
    b, c = random(k, n, seed=1), random(m, n, seed=2)
    product, out = a.float() @ b.float(), torch.empty(m, n, dtype=torch.bfloat16)
    assert torch.equal(a @ b, once(product))
    assert torch.equal(torch.mm(a, b, out=out), once(product)) and torch.equal(out, once(product))
    assert torch.equal(torch.nn.functional.linear(a, b.t()), once(product))
    summed = torch.addmm(c.float(), a.float(), b.float(), beta=0.5, alpha=2)
    assert torch.equal(torch.addmm(c, a, b, beta=0.5, alpha=2), once(summed))
    assert torch.equal(torch.addmm(c, a, b, beta=0.5, alpha=2, out=out), once(summed))
    assert torch.equal(c.clone().addmm_(a, b, beta=0.5, alpha=2), once(summed))
    stacked = torch.stack((a, a)), torch.stack((b, b))
    expected = once(torch.stack((product, product)))
    assert torch.equal(torch.bmm(*stacked), expected)
    assert torch.equal(torch.bmm(*stacked, out=torch.empty_like(expected)), expected)


def test_gradients_flow_and_have_the_operands_type(wide):
    a, b = random(5, 9).requires_grad_(), random(9, 4, seed=1).requires_grad_()
    dy = random(5, 4, seed=2)
    (a @ b).backward(dy)
    assert torch.equal(a.grad, once(dy.float() @ b.detach().float().t()))
    assert torch.equal(b.grad, once(a.detach().float().t() @ dy.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_other_types_go_their_way(monkeypatch, dtype):
    a, b, c = (random(6, 6, seed=seed, dtype=torch.float32).mul(9).to(dtype) for seed in range(3))
    before = a @ b, torch.addmm(c, a, b), torch.bmm(a[None], b[None])
    monkeypatch.setattr(bf16_matmul, "has_bf16_products", lambda: False)
    with bf16_matmul.bf16_products():
        after = a @ b, torch.addmm(c, a, b), torch.bmm(a[None], b[None])
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_wrong_shape_is_refused_as_before(wide):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        random(2, 3) @ random(4, 5)


def test_only_a_session_in_bf16_asks_for_them_and_takes_them_back(monkeypatch):
    asked = []
    monkeypatch.setattr(bf16_matmul, "has_bf16_products", lambda: asked.append(1) or False)
    with open_session(ParallelConfig(bf16=False), seed=1):
        assert not asked and not replaced()
    with open_session(ParallelConfig(bf16=True), seed=1):
        assert asked and len(replaced()) == 7
    assert not replaced()
