"""Kernels while a GPU is pretended: the launchers run up to the start, the numbers come from the reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_ring.kernels import dispatch
from megatron_ring.kernels.expert_mlp import cpu as expert_host
from megatron_ring.kernels.expert_mlp import op as expert_op
from megatron_ring.kernels.grouped_gemm import cpu as product_host
from megatron_ring.kernels.grouped_gemm import op as product_op
from tools.gpu.no_device import driver_of


def _segments(cu_S: Tensor) -> Iterator[slice]:
    ends = cu_S.tolist()
    return (slice(begin, end) for begin, end in itertools.pairwise(ends) if end > begin)


def _weights(q_THC: Tensor, k_TGC: Tensor, scale: float) -> Tensor:
    """Causal softmax [H, T, T] of one segment in fp32, every key head repeated for its queries."""
    scores = torch.einsum("thc,shc->hts", q_THC.float(), k_TGC.float()) * scale
    T = len(q_THC)
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def _varlen_attention(q, k, v, cu_q, _cu_k, _max_q, _max_k, _causal, scale, *_: Any) -> tuple[Tensor, ...]:
    """``torch_attn::_varlen_attn``: context, logsumexp (not computed here), state of a generator."""
    out, repeats = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for own in _segments(cu_q):
        keys, values = (x[own].repeat_interleave(repeats, 1) for x in (k, v))
        out[own] = torch.einsum("hts,shc->thc", _weights(q[own], keys, scale), values.float()).to(q.dtype)
    return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def _varlen_attention_backward(
    dout, q, k, v, _out, _lse, cu_q, _cu_k, _max_q, _max_k, _causal, _rng, scale, *_: Any
) -> tuple[Tensor, ...]:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    for own in _segments(cu_q):
        keys, values = (x[own].repeat_interleave(repeats, 1).float() for x in (k, v))
        P, do = _weights(q[own], keys, scale), dout[own].float()
        dP = torch.einsum("thc,shc->hts", do, values)
        dS = P * (dP - (dP * P).sum(-1, keepdim=True)) * scale
        dq[own] = torch.einsum("hts,shc->thc", dS, keys).to(q.dtype)
        for target, whole in (
            (dk, torch.einsum("hts,thc->shc", dS, q[own].float())),
            (dv, torch.einsum("hts,thc->shc", P, do)),
        ):
            target[own] = whole.unflatten(1, (groups, repeats)).sum(2).to(target.dtype)
    return dq, dk, dv


STAND_INS = {
    "torch_attn._varlen_attn.default": _varlen_attention,
    "torch_attn._varlen_attn_backward.default": _varlen_attention_backward,
}
"""Operators that have no kernel on the CPU."""


class _Twice:
    """A kernel's launcher, then its reference: what both return must have one shape, dtype and device."""

    def __init__(self, launcher: Any, reference: Any, seen: Any, kind: type):
        self.launcher, self.reference, self.seen, self.kind = launcher, reference, seen, kind

    def __getattr__(self, name: str) -> Any:
        launch, compute = getattr(self.launcher, name), getattr(self.reference, name)

        def call(*args: Any, **options: Any) -> Any:
            launched = launch(*args, **options)
            tensors = [x for x in tree_flatten((args, options))[0] if isinstance(x, self.kind)]
            outer = {id(x.inner): x for x in tensors}
            plain = tree_map(lambda x: x.inner if isinstance(x, self.kind) else x, (args, options))
            with dispatch.force("torch"):
                computed = compute(*plain[0], **plain[1])

            def outward(x: Any) -> Any:
                if not isinstance(x, torch.Tensor):
                    return x
                known = outer.get(id(x))
                return self.kind(x) if known is None else known

            result = tree_map(outward, computed)
            _compare(f"{self.launcher.__name__}.{name}", launched, result)
            return result

        return call


def _compare(name: str, launched: Any, computed: Any) -> None:
    def said(result: Any) -> list:
        return [
            (tuple(x.shape), x.dtype, str(x.device)) if isinstance(x, torch.Tensor) else x
            for x in tree_flatten(result)[0]
        ]

    if said(launched) != said(computed):
        raise AssertionError(f"{name}: the launcher returns {said(launched)}, the reference {said(computed)}")


@contextmanager
def kernels(seen: Any, kind: type) -> Iterator[None]:
    implementation = dispatch.implementation

    def start(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = dict(zip((each.name for each in kernel.params), args, strict=False)) | options
        for name, value in named.items():
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, kind):
                raise ValueError(
                    f"Pointer argument {name} of {kernel.fn.__name__} cannot be accessed (cpu tensor?)"
                )
        seen.launches[kernel.fn.__name__] += 1

    def both(tensor: Tensor, folder: str) -> Any:
        launcher = implementation(tensor, folder)
        # the reference, where that was asked for
        if not isinstance(tensor, kind) or dispatch._forced == "torch":
            return launcher
        assert launcher.__name__.endswith(".kernel"), f"{folder}: {launcher.__name__} on a GPU"
        with dispatch.force("torch"):
            return _Twice(launcher, implementation(tensor, folder), seen, kind)

    def grouped(choose: Any, host: Any) -> Any:
        def chosen(x_ND: Tensor, w_eFD: Tensor) -> Any:
            launcher = choose(x_ND, w_eFD)
            if not isinstance(x_ND, kind) or launcher is host:
                return launcher
            return _Twice(launcher, host, seen, kind)

        return chosen

    with driver_of(90), ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", start))
        stack.enter_context(mock.patch.object(dispatch, "implementation", both))
        for op, host in ((expert_op, expert_host), (product_op, product_host)):
            stack.enter_context(mock.patch.object(op, "kernels_for", grouped(op.kernels_for, host)))
        yield
