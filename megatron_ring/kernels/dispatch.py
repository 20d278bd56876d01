"""Select the implementation of a kernel: one rule, logged once.

CUDA tensor -> Triton; CPU tensor -> ``torch.ops.megatron_ring`` if the extension was built and
``MEGATRON_RING_EXT`` is not ``0``, else plain torch. A kernel has the same name and signature in all three
places: ``implementation(x, "permute").combine_rows(...)`` calls ``permute/kernel.py``, the extension or
``permute/reference.py``.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["triton", "native", "torch"]

log = logging.getLogger("megatron_ring.kernels")

_forced: Backend | None = None


def backend(tensor: Tensor) -> Backend:
    """The backend for ``tensor``'s device."""
    if _forced is not None:
        return _forced
    if tensor.is_cuda:
        return _cuda_backend()
    return _cpu_backend() if tensor.device.type == "cpu" else "torch"


def implementation(tensor: Tensor, folder: str) -> Any:
    """The kernels of ``folder`` for ``tensor``: a module, or ``torch.ops.megatron_ring``."""
    name = backend(tensor)
    if name == "native":
        return torch.ops.megatron_ring
    return importlib.import_module(
        f"megatron_ring.kernels.{folder}.{'kernel' if name == 'triton' else 'reference'}"
    )


@contextmanager
def force(name: Backend) -> Iterator[None]:
    """Use one backend on every device: for tests (Triton's interpreter on the CPU) and for benchmarks."""
    global _forced
    before, _forced = _forced, name
    try:
        if name == "native" and not _native_is_built():
            raise RuntimeError("megatron_ring._C is not built: run `pip install -e . --no-build-isolation`")
        yield
    finally:
        _forced = before


def native_is_available() -> bool:
    """True if CPU tensors use the C++ extension."""
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
        "kernels on the CPU: plain torch; experts, routing, combine and log p + entropy are slower; "
        "install a C++ compiler and run `pip install -e . --no-build-isolation`"
    )
    return "torch"


@functools.cache
def _native_is_built() -> bool:
    """Import the extension, which registers its ops, if it was built. A broken extension raises."""
    if importlib.util.find_spec("megatron_ring._C") is None:
        return False
    importlib.import_module("megatron_ring._C")
    return True
