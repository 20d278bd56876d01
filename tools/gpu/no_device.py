"""Launches without a GPU: the launchers' calls go through Triton's compiler and stop where a kernel would
start.

    with recording(arch=90) as launches:
        rms_norm(x, weight)        # CPU tensors under dispatch.force("triton"); the result is not computed

Each launch is checked for what the driver would refuse: tensor maps (CUDA driver API, cuTensorMapEncodeTiled),
shared memory, grids, scratch that nobody allocates. Compiled kernels go into Triton's cache, where a GPU of
``arch`` finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# opt-in shared memory per block of sm_80, sm_90 and sm_100 (CUDA C++ programming guide, compute capabilities)
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
_MAX_GRID = (2**31 - 1, 65_535, 65_535)
_SWIZZLE_BYTES = {0: None, 1: 32, 2: 64, 3: 128}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch that was stopped. ``binary`` tells compiled kernels apart; ``problems`` are empty if all is well."""

    kernel: str
    binary: str
    shared_bytes: int
    grid: tuple[int, ...]
    cubin: bytes
    problems: tuple[str, ...]


@contextmanager
def recording(arch: int, *, launchers: bool = False) -> Iterator[list[Launch]]:
    """Inside the block every launch is compiled for ``arch``, recorded in the list and not run.

    ``launchers``: also build the C function that Triton 3.6 needs for each signature, which needs a CUDA
    driver.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def stop(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        if launchers and hasattr(nvidia, "make_launcher"):
            nvidia.CudaLauncher(compiled.src, compiled.metadata)
        size = grid(options) if callable(grid) else grid
        named = dict(zip((each.name for each in kernel.params), args, strict=False)) | options
        launches.append(_launch(kernel.fn.__name__, compiled, tuple(size), named, arch))
        return compiled

    with driver_of(arch), mock.patch.object(JITFunction, "run", stop):
        yield launches


@contextmanager
def driver_of(arch: int) -> Iterator[None]:
    """Inside the block Triton's driver reports a GPU of ``arch``."""
    # asking for it would look for a device
    before = driver._active
    driver.set_active(_NoDevice(arch))
    try:
        yield
    finally:
        driver.set_active(before)


def _launch(
    name: str, compiled: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], arch: int
) -> Launch:
    meta = compiled.metadata
    problems = list(_grid_problems(grid))
    if meta.shared > SHARED_BYTES[arch]:
        problems.append(f"{meta.shared} bytes of shared memory, at most {SHARED_BYTES[arch]}")
    if getattr(meta, "global_scratch_size", 0):
        problems.append(f"{meta.global_scratch_size} bytes of global scratch, which nobody allocates")
    descriptors = [value for value in arguments.values() if isinstance(value, TensorDescriptor)]
    maps = getattr(meta, "tensordesc_meta", None) or ()
    if arch >= 90 and len(maps) != len(descriptors):
        problems.append(f"{len(descriptors)} descriptors, {len(maps)} of them tensor maps")
    for descriptor, tensor_map in zip(descriptors, maps, strict=False):
        problems += _map_problems(descriptor, tensor_map)
    return Launch(
        kernel=name,
        binary=compiled.hash,
        shared_bytes=meta.shared,
        grid=grid,
        cubin=compiled.asm["cubin"],
        problems=tuple(f"{name}: {problem}" for problem in problems),
    )


def _grid_problems(grid: Sequence[int]) -> Iterator[str]:
    if any(not 0 < size <= limit for size, limit in zip(grid, _MAX_GRID, strict=False)):
        yield f"grid {grid}"


def _map_problems(descriptor: TensorDescriptor, tensor_map: Mapping[str, Any]) -> Iterator[str]:
    """What cuTensorMapEncodeTiled would refuse of one descriptor."""
    size = descriptor.base.dtype.itemsize
    shape, box = list(descriptor.shape), list(tensor_map["block_size"])
    if descriptor.base.data_ptr() % 16:
        yield "a descriptor's base is not aligned to 16 bytes"
    for stride in list(descriptor.strides)[:-1]:
        if (stride * size) % 16 or not 0 <= stride * size < 2**40:
            yield f"a descriptor's stride of {stride * size} bytes is no multiple of 16 below 2^40"
    if not 1 <= len(shape) <= 5 or len(box) != len(shape) or any(not 0 < n <= 2**32 for n in shape):
        yield f"a descriptor's shape {shape} with a box {box}"
    if any(not 0 < n <= 256 for n in box):
        yield f"a descriptor's box {box}, at most 256 each"
    inner, swizzle = box[-1] * tensor_map["elem_size"], _SWIZZLE_BYTES[tensor_map["swizzle"]]
    if inner % 16 or (swizzle and inner > swizzle):
        yield f"a descriptor's inner box of {inner} bytes under a swizzle of {swizzle}"


class _Properties:
    def __init__(self, arch: int):
        self.arch = arch

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {
            "multiprocessor_count": _MULTIPROCESSORS[self.arch],
            "max_shared_mem": SHARED_BYTES[self.arch],
            "max_num_regs": 65_536,
            "warpSize": 32,
        }


class _NoDevice:
    """What Triton asks its driver before a launch."""

    launcher_cls: ClassVar[Callable | None] = None

    def __init__(self, arch: int):
        self.arch, self.utils = arch, _Properties(arch)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # compiled kernels are kept by device number: one per architecture keeps them apart
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, _cache: torch.Tensor) -> None:
        """Does nothing: there is no cache to clear."""

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind
