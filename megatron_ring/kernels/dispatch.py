"""Which code runs a kernel: one rule, said once in the log.

CUDA tensor -> Triton; CPU tensor -> ``torch.ops.megatron_ring`` if the extension was built and
``MEGATRON_RING_EXT`` is not ``0``, else plain torch. Every op asks ``backend(tensor)`` and nothing else.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

Backend = Literal["triton", "native", "torch"]

log = logging.getLogger("megatron_ring.kernels")

_forced: Backend | None = None


def backend(tensor: Tensor) -> Backend:
    """The backend that serves ``tensor``'s device."""
    if _forced is not None:
        return _forced
    if tensor.is_cuda:
        return _cuda_backend()
    return _cpu_backend() if tensor.device.type == "cpu" else "torch"


@contextmanager
def force(name: Backend) -> Iterator[None]:
    """Run one backend whatever the device: for tests (Triton's interpreter on the CPU) and for benchmarks."""
    global _forced
    before, _forced = _forced, name
    try:
        if name == "native" and not _native_is_built():
            raise RuntimeError("megatron_ring._C is not built: run `pip install -e . --no-build-isolation`")
        yield
    finally:
        _forced = before


def native_is_available() -> bool:
    """True where CPU tensors run in C++."""
    return _cpu_backend() == "native"


@functools.cache
def _cuda_backend() -> Backend:
    if importlib.util.find_spec("triton") is not None:
        log.info("kernels on CUDA: Triton")
        return "triton"
    log.warning("kernels on CUDA: plain torch, several times slower; install triton")
    return "torch"


@functools.cache
def _cpu_backend() -> Backend:
    if os.environ.get("MEGATRON_RING_EXT", "1") == "0":
        log.info("kernels on the CPU: plain torch (MEGATRON_RING_EXT=0)")
        return "torch"
    if _native_is_built():
        log.info("kernels on the CPU: C++ (megatron_ring._C)")
        return "native"
    log.warning(
        "kernels on the CPU: plain torch: routing, combine and log p + entropy are slower; megatron_ring._C is not "
        "built: install a C++ compiler and run `pip install -e . --no-build-isolation`"
    )
    return "torch"


@functools.cache
def _native_is_built() -> bool:
    """Load the extension, which registers its ops, if it was built. A broken build raises; it is not hidden."""
    if importlib.util.find_spec("megatron_ring._C") is None:
        return False
    importlib.import_module("megatron_ring._C")
    return True
