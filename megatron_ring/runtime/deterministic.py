"""Deterministic operations for the length of a session: the same inputs give the same bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from megatron_ring.errors import ConfigError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_REQUIRED: dict[str, tuple[str, ...]] = {
    _CUBLAS: (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Variables that cuBLAS and Transformer Engine read when they start, and the values that they accept."""

_CHOSEN = {"NCCL_ALGO": "Ring"}
"""Defaults that keep the order of sums; the user's own value wins. Megatron asks for it, too."""


@contextlib.contextmanager
def deterministic_operations() -> Iterator[None]:
    """Make torch use deterministic implementations and fail where there is none; undone at the end of the block.

    Enter it before CUDA starts: cuBLAS reads its variable once. Torch's filling of new memory with NaN stays off: it costs
    time and changes no result.

    Raises:
        ConfigError: a variable of the environment asks for the opposite.
    """
    names = (*_REQUIRED, *_CHOSEN)
    before = {name: os.environ.get(name) for name in names}
    for name, values in _REQUIRED.items():
        if before[name] not in (None, *values):
            raise ConfigError(
                f"deterministic=True needs {name}={' or '.join(values)}, but the environment says "
                f"{before[name]}; unset it or drop --deterministic"
            )
    # torch defines these attributes on its modules at run time
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    flags = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills, benchmark, only = memory.fill_uninitialized_memory, cudnn.benchmark, cudnn.deterministic
    try:
        for name, value in ({name: values[0] for name, values in _REQUIRED.items()} | _CHOSEN).items():
            os.environ.setdefault(name, value)
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory, cudnn.benchmark, cudnn.deterministic = False, False, True
        yield
    finally:
        torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
        memory.fill_uninitialized_memory, cudnn.benchmark, cudnn.deterministic = fills, benchmark, only
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
