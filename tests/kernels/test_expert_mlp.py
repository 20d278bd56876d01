"""expert_mlp: every backend against fp64. Inputs lie between NaNs; on Triton outputs lie between canaries."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ring.kernels import expert_mlp
from megatron_ring.kernels.expert_mlp import cpu, reference
from tests.helpers.kernels.backends import INTERPRETED, relative_error, run_in_the_interpreter
from tests.helpers.kernels.grouped_rows import SHAPES, WIDTHS, offsets_of, poisoned

NAMES = ("y", "dx", "dw_up", "dw_down", "dprobs")


def operands(counts: list[int], past: int, D: int, F: int, dtype=torch.float32) -> tuple[Tensor, ...]:
    """(x, w_up, w_down, probs, offsets, dy), reproducible; the first four are leaves, probs never 16-bit."""
    make = torch.Generator().manual_seed(len(counts) + sum(counts) + D)
    e, N = len(counts), sum(counts) + past
    shapes = ((N, D), (e, 2, F, D), (e, D, F), (N,), (N, D))
    x, w_up, w_down, probs, dy = (torch.randn(s, generator=make) for s in shapes)
    leaves = (poisoned(t.to(dtype)) for t in (x, w_up / D**0.5, w_down / F**0.5))
    wide = dtype if dtype == torch.float64 else torch.float32
    return *leaves, poisoned(probs.abs().to(wide)), offsets_of(counts), dy.to(dtype)


def in_fp64(x, w_up, w_down, probs, offsets, dy) -> tuple[Tensor, ...]:
    """(y, dx, dw_up, dw_down, dprobs) by autograd through the reference in double precision; no None."""
    leaves = [t.detach().double().requires_grad_() for t in (x, w_up, w_down, probs)]
    y = reference.expert_mlp(*leaves[:3], offsets, leaves[3])
    found = torch.autograd.grad(y, leaves, dy.double(), materialize_grads=True)
    return y.detach(), *found


def found_by_op(x, w_up, w_down, probs, offsets, dy) -> tuple[Tensor, ...]:
    y = expert_mlp(x, w_up, w_down, offsets, probs)
    return y, *torch.autograd.grad(y, (x, w_up, w_down, probs), dy)


def check(counts: list[int], past: int, D: int, F: int, dtype=torch.float32, tolerance: float = 1e-5) -> None:
    """Forward and all four gradients against fp64."""
    given = operands(counts, past, D, F, dtype)
    for name, found, wanted in zip(NAMES, found_by_op(*given), in_fp64(*given), strict=True):
        assert relative_error(found, wanted) <= tolerance, (name, counts, relative_error(found, wanted))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("D", "F"), WIDTHS)
def test_forward_and_gradients_equal_fp64(backend, name, D, F):
    check(*SHAPES[name], D, F)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_z_h_and_the_results(backend, dtype):
    # the interpreter truncates to bf16 where a GPU rounds
    check([3, 0, 20], 2, 24, 40, dtype, tolerance=(2 + 2 * (backend == "triton")) * torch.finfo(dtype).eps)


def test_gradients_are_right_in_double_precision(backend):
    *leaves, offsets, _ = operands([2, 0, 3], 1, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: expert_mlp(*t[:3], offsets, t[3]), leaves)


def test_large_enough_for_every_thread_with_one_expert_above_its_share(backend):
    if backend == "triton":
        pytest.skip("only the host has threads to feed")
    check([300, 20, 0, 40, 30, 25], 3, 64, 96)


def test_large_gates_saturate_and_stay_finite(backend):
    x, w_up, w_down, probs, offsets, dy = operands([4, 4], 0, 8, 8)
    given = (poisoned(x.detach() * 300), w_up, w_down, probs, offsets, dy)
    for found, wanted in zip(found_by_op(*given), in_fp64(*given), strict=True):
        assert relative_error(found, wanted) <= 1e-5


def test_docstring_examples(backend):
    one, down, offsets = torch.tensor([[1.0]]), torch.tensor([[[2.0]]]), offsets_of([1])
    assert expert_mlp(one, torch.tensor([[[[0.0]], [[3.0]]]]), down, offsets).tolist() == [[0.0]]
    half = torch.tensor([0.5])
    assert expert_mlp(one, torch.tensor([[[[50.0]], [[3.0]]]]), down, offsets, half).tolist() == [[150.0]]


def test_without_probs_every_row_counts_one(backend):
    x, w_up, w_down, probs, offsets, dy = operands([3, 0, 4], 2, 16, 8)
    ones = found_by_op(x, w_up, w_down, torch.ones_like(probs).requires_grad_(), offsets, dy)
    y = expert_mlp(x, w_up, w_down, offsets)
    none = (y, *torch.autograd.grad(y, (x, w_up, w_down), dy))
    assert all(map(torch.equal, none, ones[:4]))


def test_rows_of_no_expert_neither_give_nor_get(backend):
    x, w_up, w_down, probs, offsets, dy = operands([3, 4], 2, 8, 8)
    with torch.no_grad():
        x[7:], dy[7:], probs[7:] = torch.nan, torch.nan, torch.nan
    y, dx, dw_up, dw_down, dprobs = found_by_op(x, w_up, w_down, probs, offsets, dy)
    assert not y[7:].any() and not dx[7:].any() and not dprobs[7:].any()
    assert all(t.isfinite().all() for t in (y, dx, dw_up, dw_down, dprobs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_main_grads_take_the_weight_gradients_by_addition(backend, dtype):
    given = operands([3, 0, 4], 2, 8, 16, dtype)
    x, w_up, w_down, probs, offsets, dy = given
    main = torch.ones(w_up.shape), torch.ones(w_down.shape)
    expert_mlp(x, w_up, w_down, offsets, probs, main_grads=main).backward(dy)
    _, dx, dw_up, dw_down, _ = in_fp64(*given)
    assert w_up.grad is None and w_down.grad is None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert relative_error(x.grad, dx) < tolerance
    assert relative_error(main[0], 1 + dw_up) < tolerance and relative_error(main[1], 1 + dw_down) < tolerance


def test_only_the_gradients_asked_for(backend):
    given = operands([3, 0, 4], 1, 8, 16)
    x, w_up, w_down, probs, offsets, dy = given
    wanted = dict(zip(("x", "w_up", "w_down", "probs"), in_fp64(*given)[1:], strict=True))
    for asked in wanted:
        leaves = {"x": x, "w_up": w_up, "w_down": w_down, "probs": probs}
        leaves = {name: t.detach().requires_grad_(name == asked) for name, t in leaves.items()}
        expert_mlp(leaves["x"], leaves["w_up"], leaves["w_down"], offsets, leaves["probs"]).backward(dy)
        assert [name for name, t in leaves.items() if t.grad is not None] == [asked]
        assert relative_error(leaves[asked].grad, wanted[asked]) < 1e-5


def test_recompute_gives_the_same_gradients(backend):
    x, w_up, w_down, probs, offsets, dy = operands([5, 0, 4], 0, 8, 8)
    plain = found_by_op(x, w_up, w_down, probs, offsets, dy)[1:]
    y = checkpoint(lambda *t: expert_mlp(*t[:3], offsets, t[3]), x, w_up, w_down, probs, use_reentrant=False)
    again = torch.autograd.grad(y, (x, w_up, w_down, probs), dy)
    assert all(map(torch.equal, plain, again))


def test_what_is_kept_for_backward_is_the_inputs_and_z(backend):
    x, w_up, w_down, probs, offsets, _ = operands([5, 0, 4], 0, 8, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        y = expert_mlp(x, w_up, w_down, offsets, probs)
    inputs = {t.data_ptr() for t in (x, w_up, w_down, probs, offsets)}
    extra = [t for t in kept if t.data_ptr() not in inputs]
    assert [tuple(t.shape) for t in extra] == [(9, 8)] and y.data_ptr() != extra[0].data_ptr()


def test_without_gradients_z_is_not_kept(backend, monkeypatch):
    kernels = cpu
    if backend == "triton":
        kernels = importlib.import_module("megatron_ring.kernels.expert_mlp.kernel")
    x, w_up, w_down, probs, offsets, dy = operands([5, 0, 4], 0, 8, 4)
    asked = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: asked.append(args[-1]) or forward(*args))
    with torch.no_grad():
        y = expert_mlp(x, w_up, w_down, offsets, probs)
    assert asked == [False]
    assert relative_error(y, in_fp64(x, w_up, w_down, probs, offsets, dy)[0]) < 1e-5


def test_experts_do_not_see_each_others_rows_or_weights(backend):
    given = operands([5, 18, 7], 0, 24, 40)
    x, w_up, w_down, probs, _, dy = given
    clean = in_fp64(*given)
    with torch.no_grad():
        for tensor in (x, dy, probs):
            tensor[5:23] = torch.nan
        w_up[1], w_down[1] = torch.nan, torch.nan
    rows, experts = torch.tensor([*range(5), *range(23, 30)]), torch.tensor([0, 2])
    for name, found, wanted in zip(NAMES, found_by_op(*given), clean, strict=True):
        mine = experts if name.startswith("dw") else rows
        assert relative_error(found[mine], wanted[mine]) < 1e-5, name


def test_one_and_seven_programs_do_what_three_do(backend, monkeypatch):
    if backend != "triton":
        pytest.skip("only Triton has programs")
    from megatron_ring.kernels.expert_mlp import kernel

    for programs in (1, 7):
        monkeypatch.setattr(kernel, "num_programs", lambda device, programs=programs: programs)
        check([20, 0, 17], 4, 16, 40)


def test_extension_refuses_offsets_past_the_rows(backend):
    if backend != "native" or not hasattr(torch.ops.megatron_ring, "expert_mlp_forward"):
        pytest.skip("only the extension checks offsets")
    x, w_up, w_down, probs, offsets, _ = operands([5, 4], 0, 8, 4)
    with pytest.raises(RuntimeError, match="must not decrease nor pass the 9 rows"):
        expert_mlp(x, w_up, w_down, offsets + 1, probs)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")
