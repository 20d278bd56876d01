"""What answers for the CUDA driver while a GPU is pretended: see ``pretend``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from megatron_ring.runtime import device

_PROPERTIES = SimpleNamespace(
    name="pretended H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
    max_threads_per_multi_processor=2048, warp_size=32, shared_memory_per_block_optin=232_448,
)  # fmt: skip


class _Stream:
    """Work runs in the host's order, so streams never wait; only the host's own waits are counted."""

    seen: Any = None

    def __init__(self, *_: Any, **__: Any):
        self.device, self.cuda_stream = torch.device("cuda", 0), 0

    def synchronize(self) -> None:
        self.seen.wait("driver")

    def wait_stream(self, _other: Any) -> None: ...
    def wait_event(self, _event: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    seen: Any = None

    def __init__(self, *_: Any, **__: Any): ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.seen.wait("driver")

    def elapsed_time(self, _other: Any) -> float:
        """Made-up milliseconds, large enough that nothing is repeated."""
        return 1e3


@contextmanager
def _on_stream(_stream: Any) -> Iterator[None]:
    yield


def _names(seen: Any, kind: type) -> dict[str, Any]:
    def waits(*_: Any, **__: Any) -> None:
        seen.wait("driver")

    def says(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    stream, generator = _Stream(), torch.Generator()
    return {
        "_lazy_init": says(None), "_lazy_call": lambda call, **_: call(), "is_available": says(True),
        "is_initialized": says(True), "device_count": says(1), "current_device": says(0), "set_device": says(None),
        "get_device_capability": says((9, 0)), "get_device_name": says(_PROPERTIES.name),
        "get_device_properties": says(_PROPERTIES), "is_bf16_supported": says(True),
        "synchronize": waits, "empty_cache": waits, "Stream": _Stream, "Event": _Event, "stream": _on_stream,
        "current_stream": says(stream), "default_stream": says(stream), "set_stream": says(None),
        "manual_seed": says(None), "manual_seed_all": says(None), "set_sync_debug_mode": says(None),
        "get_rng_state": lambda *_, **__: generator.get_state(),
        "set_rng_state": lambda state, *_, **__: generator.set_state(state),
        "max_memory_allocated": says(0), "memory_allocated": says(0), "memory_reserved": says(0),
        "reset_peak_memory_stats": says(None), "is_current_stream_capturing": says(False),
        "default_generators": (generator,),
    }  # fmt: skip


class DeviceGenerator(torch.Generator):
    """A generator on the CPU in place of the device's."""

    def __new__(cls, device: Any = "cpu"):
        return super().__new__(cls)


class _MetaForCuda(TorchFunctionMode):
    """Passes meta to torch's C++ wherever Python said cuda, so that no driver is needed."""

    def __init__(self, seen: Any, kind: type):
        super().__init__()
        self.seen, self.kind = seen, kind

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            return self._from_python(func, args, kwargs)
        if func is torch.Tensor.new_tensor and isinstance(args[0], self.kind):
            like = {"dtype": args[0].dtype, "device": args[0].device}
            return self._from_python(torch.tensor, args[1:2], like | kwargs)
        if func is torch.Tensor.__setitem__ and isinstance(args[2], self.kind) and args[2].numel() == 1:
            # with a number on the host it is a masked fill, which does not wait
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(key, torch.Tensor) and key.dtype is torch.bool and key.dim() for key in keys):
                self.seen.wait("size")
        if func is torch.Tensor.cuda:
            return args[0].to("meta")
        if func is torch.Tensor.pin_memory:
            return self.seen.pin(args[0].clone())
        if func is torch.Tensor.is_pinned:
            return self.seen.is_pinned(args[0])
        if kwargs.get("pin_memory"):
            return self.seen.pin(func(*args, **kwargs | {"pin_memory": False}))
        if func is torch.Tensor.to:
            args = tuple(map(_meta, args))
        return func(*args, **{k: _meta(v, k == "device") for k, v in kwargs.items()})

    def _from_python(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The device comes last: a copy from memory that is not pinned, which waits, as does each scalar in a list."""
        args = (self._numbers(args[0]), *args[1:])
        place = kwargs.pop("device", args[2] if len(args) > 2 else None)
        if place is None and not isinstance(args[0], torch.Tensor):
            place = torch.get_default_device()
        if place is None:
            return func(*args, **kwargs)
        grad = kwargs.pop("requires_grad", False)
        made = args[0] if isinstance(args[0], torch.Tensor) else func(*args[:2], **kwargs, device="cpu")
        return made.to(_meta(place, True), kwargs.get("dtype", made.dtype)).requires_grad_(grad)

    def _numbers(self, data: Any) -> Any:
        """Lists of tensors: torch reads one scalar after the other from the device."""
        if isinstance(data, list | tuple):
            return [each.tolist() if isinstance(each, self.kind) else self._numbers(each) for each in data]
        return data


def _meta(value: Any, names_a_device: bool = False) -> Any:
    is_cuda = isinstance(value, torch.device | str) and str(value).startswith("cuda")
    return torch.device("meta") if is_cuda or (names_a_device and type(value) is int) else value


@contextmanager
def cuda_names(seen: Any, kind: type) -> Iterator[None]:
    """``torch.cuda`` and the few factories that ask the driver before any dispatch."""
    apply = torch.nn.Module._apply

    def apply_and_keep_attributes(self: torch.nn.Module, fn: Any, recurse: bool = True) -> Any:
        """torch makes new parameters where kinds of tensor change; from host to device they stay what they are."""
        before = {name: p.__dict__.copy() for name, p in self._parameters.items() if p is not None}
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            result = apply(self, fn, recurse)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
        for name, attributes in before.items():
            for key, value in attributes.items():
                if key != "inner":
                    self._parameters[name].__dict__.setdefault(key, value)
        return result

    _Stream.seen = _Event.seen = seen
    with ExitStack() as stack:
        for name, value in _names(seen, kind).items():
            for module in (torch.cuda, torch.cuda.random):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", DeviceGenerator))
        # NCCL's traffic goes through gloo
        stack.enter_context(mock.patch.object(device, "collective_backend", lambda: "gloo"))
        stack.enter_context(_MetaForCuda(seen, kind))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", apply_and_keep_attributes))
        yield
