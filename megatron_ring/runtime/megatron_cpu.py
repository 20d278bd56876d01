"""Megatron-Core on a machine without CUDA: CPU equivalents of the few CUDA functions that it calls.

The session enters :func:`megatron_on_cpu` when the device is the CPU; it is undone on exit. Every row of :data:`STAND_INS`
names the upstream lines that need it (megatron-core 0.16.1); delete a row when upstream no longer names CUDA there.
``hits()`` tells which rows a run has used. A test asserts that training uses exactly the rows of the table, so an upgrade
that adds or drops a CUDA call is noticed.

No ``TorchFunctionMode`` is active during a step (it costs about 1 us per torch call). For literal ``device="cuda"`` the few
modules that contain it get a proxy for their ``torch`` name. The mode is active only inside the optimizer constructors that
call ``Tensor.type()``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_CORE = "megatron.core."


@dataclass(frozen=True)
class StandIn:
    """One CUDA function and its replacement on the CPU.

    ``target`` is the module whose attribute ``name`` is replaced; ``serves`` lists upstream ``file:line``.
    """

    key: str
    target: str
    name: str
    serves: tuple[str, ...]
    make: Callable[[object, Callable[[], None]], object]


_hits: set[str] = set()


def hits() -> frozenset[str]:
    """Keys of the stand-ins used since the last :func:`reset_hits`."""
    return frozenset(_hits)


def reset_hits() -> None:
    _hits.clear()


class _CudaNamesOnHost(TorchFunctionMode):
    """``Tensor.type()`` returns the CUDA class name, and ``Tensor.cuda()`` the tensor itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


class _TorchProxy:
    """``torch`` for one upstream module: its factory functions take ``device="cuda"`` as the CPU."""

    def __init__(self, hit: Callable[[], None]):
        self._hit = hit
        for factory in ("zeros", "tensor", "empty", "ones"):
            setattr(self, factory, self._on_host(getattr(torch, factory)))

    def _on_host(self, factory: Callable) -> Callable:
        @functools.wraps(factory)
        def wrapped(*args, **kwargs):
            if kwargs.get("device") == "cuda":
                self._hit()
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return wrapped

    def __getattr__(self, name: str):
        return getattr(torch, name)


def _returns(value: object) -> Callable:
    def make(_original, hit):
        def stand_in(*_args, **_kwargs):
            hit()
            return value

        return stand_in

    return make


def _instead(function: Callable) -> Callable:
    def make(_original, hit):
        def stand_in(*args, **kwargs):
            hit()
            return function(*args, **kwargs)

        return stand_in

    return make


def _torch_proxy(_original, hit):
    return _TorchProxy(hit)


def _under_cuda_names(original, hit):
    """Run ``original`` (a constructor or a classmethod's function) with CUDA type names for CPU tensors."""
    function = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        hit()
        with _CudaNamesOnHost():
            return function(*args, **kwargs)

    return classmethod(wrapped) if isinstance(original, classmethod) else wrapped


def _set_state(state, *_args, **_kwargs):
    torch.set_rng_state(state)


def _get_state(*_args, **_kwargs):
    return torch.get_rng_state()


_HOST = torch.device("cpu")

STAND_INS: tuple[StandIn, ...] = (
    StandIn(
        "current_device",
        "torch.cuda",
        "current_device",
        (
            "tensor_parallel/layers.py:261,552,873,1197",
            "tensor_parallel/mappings.py:141,148,181,442",
            "distributed/param_and_grad_buffer.py:783,800,806",
            "pipeline_parallel/p2p_communication.py:313,321",
        ),
        _returns(_HOST),
    ),
    StandIn(
        "get_rng_state",
        "torch.cuda",
        "get_rng_state",
        ("tensor_parallel/random.py:235,238",),
        _instead(_get_state),
    ),
    StandIn(
        "manual_seed",
        "torch.cuda",
        "manual_seed",
        ("tensor_parallel/random.py:237,422",),
        _instead(torch.manual_seed),
    ),
    StandIn(
        "tracker_get_rng_state",
        _CORE + "tensor_parallel.random",
        "_get_cuda_rng_state",
        ("tensor_parallel/random.py:55 (fork, checkpoint)",),
        _instead(_get_state),
    ),
    StandIn(
        "tracker_set_rng_state",
        _CORE + "tensor_parallel.random",
        "_set_cuda_rng_state",
        ("tensor_parallel/random.py:103 (add, fork, checkpoint)",),
        _instead(_set_state),
    ),
    StandIn(
        "schedules_literals",
        _CORE + "pipeline_parallel.schedules",
        "torch",
        ("pipeline_parallel/schedules.py:596,983,2138",),
        _torch_proxy,
    ),
    StandIn(
        "clip_grads_literals",
        _CORE + "optimizer.clip_grads",
        "torch",
        ("optimizer/clip_grads.py:90,103,115",),
        _torch_proxy,
    ),
    StandIn(
        "optimizer_literals",
        _CORE + "optimizer.optimizer",
        "torch",
        ("optimizer/optimizer.py:473,481,485",),
        _torch_proxy,
    ),
    StandIn(
        "distributed_optimizer_type_names",
        _CORE + "optimizer.distrib_optimizer.DistributedOptimizer",
        "_build_model_and_main_param_groups",
        ("optimizer/distrib_optimizer.py:361,420",),
        _under_cuda_names,
    ),
    StandIn(
        "float16_optimizer_type_names",
        _CORE + "optimizer.optimizer.Float16OptimizerWithFloat16Params",
        "__init__",
        ("optimizer/optimizer.py:671,690",),
        _under_cuda_names,
    ),
    StandIn(
        "gathered_optimizer_state_cuda",
        _CORE + "optimizer.distrib_optimizer.DistributedOptimizer",
        "get_parameter_state_dp_zero",
        ("optimizer/distrib_optimizer.py:1089 (saving a checkpoint)",),
        _under_cuda_names,
    ),
    StandIn(
        "synchronize",
        "torch.cuda",
        "synchronize",
        (
            "dist_checkpointing/strategies/filesystem_async.py:230",
            "dist_checkpointing/strategies/async_utils.py:212 (asynchronous saves)",
        ),
        _returns(None),
    ),
    StandIn(
        "shared_embedding_cuda",
        _CORE + "models.common.language_module.language_module.LanguageModule",
        "setup_embeddings_and_output_layer",
        ("models/common/language_module/language_module.py:244 (embedding copy of MTP stages)",),
        _under_cuda_names,
    ),
)


def _resolve(target: str) -> ModuleType | type:
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError:
        module, _, attribute = target.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Let Megatron-Core run on the CPU for the length of the ``with`` block.

    Raises ``RuntimeError`` if there is CUDA.
    """
    if torch.cuda.is_available():
        raise RuntimeError("megatron_on_cpu() replaces CUDA names and must not be entered where CUDA exists")
    tracker_log = logging.getLogger(_CORE + "tensor_parallel.random")
    level = tracker_log.level
    # on the CPU both generators are the same one, so the tracker's "CPU RNG state changed" warning always fires
    tracker_log.setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        for row in STAND_INS:
            owner = _resolve(row.target)
            original = vars(owner).get(row.name, getattr(owner, row.name))
            replacement = row.make(original, functools.partial(_hits.add, row.key))
            stack.enter_context(mock.patch.object(owner, row.name, replacement))
        try:
            yield
        finally:
            tracker_log.setLevel(level)
