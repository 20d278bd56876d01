"""A pretended GPU: CPU tensors that report ``cuda:0``, to find what a GPU would refuse or wait for.

    with pretending() as seen:
        x = torch.ones(3, device="cuda")
        x.sum().item()             # 3.0, and seen.waits has the line
        x + torch.ones(3)          # raises, as on a GPU

What a GPU computes and how fast is not seen here, nor are waits inside of torch's own kernels that are not listed below.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tools.gpu.pretend_cuda import cuda_names
from tools.gpu.pretend_kernels import STAND_INS, kernels

_CUDA = torch.device("cuda", 0)
_HERE = str(Path(__file__).parent / "pretend")
_aten = torch.ops.aten
_SIZES_ON_HOST = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.bincount.default,
    _aten.equal.default,
    _aten.allclose.default,
    _aten.is_nonzero.default,
    _aten.multinomial.default,
}
"""Operations for which torch waits for the device (beside copies, scalars, and masks that index)."""

_NEVER_DETERMINISTIC = (
    "bincount", "cumsum", "cumsum_", "grid_sampler_2d", "histc", "kthvalue", "max_pool3d_with_indices", "median",
    "nll_loss_forward", "put", "put_",
)  # fmt: skip
"""Operations of language models that ``torch.use_deterministic_algorithms`` refuses on CUDA."""

_MAY_MIX = {_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default}


@dataclass(frozen=True, order=True)
class Place:
    """Where the host waited. ``kind``: scalar, to host, to device, size, driver (``torch.cuda.synchronize`` and such)."""

    kind: str
    file: str
    function: str
    line: int


@dataclass
class Seen:
    """What happened on the pretended device.

    ``pageable`` are copies from memory that is not pinned: they are called asynchronous, but may wait.
    """

    waits: Counter[Place] = field(default_factory=Counter)
    pageable: Counter[Place] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    quiet: bool = False
    _pinned: set[int] = field(default_factory=set)

    def wait(self, kind: str) -> None:
        if not self.quiet:
            self.waits[_place(kind)] += 1

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        self._pinned.add(address)
        weakref.finalize(tensor.untyped_storage(), self._pinned.discard, address)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def clear(self) -> None:
        for each in (self.waits, self.pageable, self.operations, self.launches):
            each.clear()


def _place(kind: str) -> Place:
    """The innermost line that is neither torch's nor this file's."""
    frame = sys._getframe(2)
    outside = ("/torch/", _HERE, "/contextlib.py", "<")
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in outside):
        frame = frame.f_back
    code = frame.f_code
    file = code.co_filename
    for root in ("/megatron/", "/megatron_ring/", "/tools/", "/tests/"):
        if root in file:
            file = root[1:] + file.rsplit(root, 1)[1]
            break
    return Place(
        kind, file, code.co_qualname if hasattr(code, "co_qualname") else code.co_name, frame.f_lineno
    )


_NOBODY = Seen(quiet=True)
_seen = _NOBODY


class CudaTensor(torch.Tensor):
    """A tensor on the CPU that says it is on ``cuda:0``; ``inner`` has its numbers, in the same memory."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False):
        # to autograd's C++ it is a tensor on "meta", which needs no driver
        self = torch.Tensor._make_subclass(cls, inner.detach(), requires_grad, dispatch_device=True)
        self.inner = inner.detach()
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    device = property(lambda self: _CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @property
    def data(self) -> CudaTensor:
        return CudaTensor(self.inner)

    @data.setter
    def data(self, other: CudaTensor) -> None:
        torch.Tensor.data.__set__(self, other)
        self.inner = other.inner

    def get_device(self) -> int:
        return 0

    def type(self, dtype: Any = None, **options: Any) -> Any:
        if dtype is None:
            return self.inner.type().replace("torch.", "torch.cuda.", 1)
        return self.to(dtype, **options)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        _seen.wait("to host")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: copy it to the host first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        _seen.wait("to host")
        return f"CudaTensor({self.inner!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _seen.wait("to host")
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> CudaTensor:
        copied = CudaTensor(self.inner.clone(), self.requires_grad)
        copied.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "inner"}
        memo[id(self)] = copied
        return copied


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    if func is torch.ops.prim.device.default:
        return torch.device("meta")
    if torch.is_inference_mode_enabled() and func._can_decompose() and str(func) not in STAND_INS:
        # autograd is not active here to do it
        with _Mode():
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
    flat, spec = tree_flatten((args, kwargs))
    cuda = [x for x in flat if isinstance(x, CudaTensor)]
    target = _target(kwargs, bool(cuda))
    if not cuda and target != "cuda":
        return func(*args, **kwargs)
    if not _seen.quiet:
        _seen.operations[str(func)] += 1
    _refuse_a_mix(func, flat, bool(cuda))
    if torch.are_deterministic_algorithms_enabled():
        _refuse_what_is_not_deterministic(func, args, kwargs)
    _note_waits(func, args, kwargs, target)
    outer = {id(x.inner): x for x in cuda}
    inner_args, inner_kwargs = tree_unflatten([_plain(x) for x in flat], spec)
    if "pin_memory" in inner_kwargs:
        inner_kwargs["pin_memory"] = None
    before = [(x.shape, x.stride()) for x in cuda]
    result = STAND_INS.get(str(func), func)(*inner_args, **inner_kwargs)
    assert before == [(x.inner.shape, x.inner.stride()) for x in cuda], f"{func} changes a shape in place"
    if target == "cpu" or func is _aten._local_scalar_dense.default:
        return result

    def outward(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        known = outer.get(id(x))
        return CudaTensor(x) if known is None else known

    return tree_map(outward, result)


def _target(kwargs: dict, cuda: bool) -> str:
    """The device of the result: C++ code that reads a pretended tensor's device gets meta."""
    device = kwargs.get("device")
    if device is None:
        return "cuda" if cuda else "cpu"
    kind = torch.device(device).type if not isinstance(device, int) else "cuda"
    return "cuda" if kind in ("cuda", "meta") else kind


def _plain(x: Any) -> Any:
    if isinstance(x, CudaTensor):
        return x.inner
    if isinstance(x, torch.device) and x.type in ("cuda", "meta"):
        return torch.device("cpu")
    return x


def _refuse_a_mix(func: Any, flat: list, any_cuda: bool) -> None:
    if func in (_aten.index.Tensor, _aten.index_put_.default) and not isinstance(flat[0], CudaTensor):
        raise RuntimeError(f"indices should be on the same device as the indexed tensor (cpu) ({func})")
    if func in _MAY_MIX:
        return
    host = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor)]
    if func.namespace == "c10d" and host:
        raise RuntimeError(f"No backend type associated with device type cpu ({func})")
    if any_cuda and any(x.dim() for x in host):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func}; on the host: {[tuple(x.shape) for x in host]})"
        )


def _refuse_what_is_not_deterministic(func: Any, args: tuple, kwargs: dict) -> None:
    name = func.overloadpacket.__name__
    exact = name in ("cumsum", "cumsum_") and not args[0].is_floating_point()
    exact |= name == "bincount" and len(args) < 2 and kwargs.get("weights") is None
    if name in _NEVER_DETERMINISTIC and not exact:
        raise RuntimeError(f"{name}_cuda does not have a deterministic implementation, but you asked for it")


def _note_waits(func: Any, args: tuple, kwargs: dict, target: str) -> None:
    if func is _aten._local_scalar_dense.default:
        _seen.wait("scalar")
    elif func in _SIZES_ON_HOST or (
        func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    ):
        _seen.wait("size")
    elif func is _aten.index_put_.default and _is_a_masked_fill(args):
        pass
    elif func in (_aten.index.Tensor, _aten.index_put_.default):
        for index in filter(torch.is_tensor, args[1]):
            if index.dtype in (torch.bool, torch.uint8):
                _seen.wait("size")
            elif not isinstance(index, CudaTensor) and index.dim():
                _seen.wait("to device")
    elif func is _aten._to_copy.default:
        _note_copy(args[0], target, not kwargs.get("non_blocking", False))
    elif func is _aten.copy_.default:
        asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        to_device = isinstance(args[0], CudaTensor)
        # into memory that is not pinned the driver copies synchronously, even with non_blocking
        asynchronous = asynchronous and (to_device or _seen.is_pinned(args[0]))
        _note_copy(args[1], "cuda" if to_device else "cpu", not asynchronous)


def _is_a_masked_fill(args: tuple) -> bool:
    """``x[mask] = number``, of a number that torch keeps on the host (one on the device: see ``pretend_cuda``)."""
    masks = [index for index in args[1] if index is not None]
    return args[2].numel() == 1 and len(masks) == 1 and masks[0].dtype in (torch.bool, torch.uint8)


def _note_copy(source: torch.Tensor, target: str, blocking: bool) -> None:
    if (target == "cuda") == isinstance(source, CudaTensor):
        return
    if blocking:
        _seen.wait("to device" if target == "cuda" else "to host")
    elif target == "cuda" and not _seen.is_pinned(source) and not _seen.quiet:
        _seen.pageable[_place("to device")] += 1


@contextmanager
def pretending() -> Iterator[Seen]:
    """Inside the block CUDA is reported as available."""
    global _seen
    assert _seen is _NOBODY, "one pretended GPU at a time"
    _seen = Seen()
    with ExitStack() as stack:
        # Megatron keeps it for the life of a process, on the device of the first step
        for scaler, first in ((MoEAuxLossAutoScaler, None), (MTPLossAutoScaler, torch.tensor(1.0))):
            stack.enter_context(mock.patch.object(scaler, "main_loss_backward_scale", first))
        stack.enter_context(cuda_names(_seen, CudaTensor))
        stack.enter_context(kernels(_seen, CudaTensor))
        stack.enter_context(_Mode())
        try:
            yield _seen
        finally:
            _seen = _NOBODY
