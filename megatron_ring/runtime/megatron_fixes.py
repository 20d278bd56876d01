"""Dated corrections to Megatron-Core that apply on every device.

Each entry names the symptom, the upstream line and when to delete it. The version is checked, so that an upgrade requires a
look at this file.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from typing import Any
from unittest import mock

import megatron.core
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import (
    GlobalMemoryBuffer,
    local_multi_tensor_l2_norm,
    local_multi_tensor_scale,
)
from torch import Tensor

from megatron_ring.errors import ConfigError
from megatron_ring.runtime.orphans import end_with_parent

TESTED_VERSIONS = ("0.16.0", "0.16.1")


def _load_given_keys(self: DistributedOptimizer, model_param, tensors) -> None:
    """2026-11: loading a checkpoint with torch's AdamW raised KeyError 'step'.

    optimizer/distrib_optimizer.py:939 (0.16.1) copies every key of the optimizer state although the sharded
    state carries no 'step'; load_state_dict (line 825) moreover gives all parameters one shared step
    tensor, which AdamW then counts up once per parameter. Delete when upstream copies only given keys and
    clones step.
    """
    group_index, group_order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group_index]["params"][group_order]
    state = self.optimizer.state[main_param]
    if "step" in state:
        state["step"] = state["step"].clone()
    destinations = {"param": main_param.data, **state}
    for key, value in tensors.items():
        if key != "step":
            destinations[key].copy_(value)


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """2026-11: a run of one process slowed down after its first step.

    distributed/param_and_grad_buffer.py:285 and :443 (0.16.1) gather and scatter whole buffers in groups of one
    process too. gloo copies them in a separate thread, whose OpenMP team outnumbers the processors from then
    on: waiting threads sleep instead of spinning, and every small parallel operation takes two to three times
    as long. Here a group of one copies nothing that is in place. Delete when upstream skips such groups.
    """

    def call(output: Tensor, source: Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        if torch.distributed.get_world_size(group) > 1:
            return collective(output, source, *args, group=group, **options)
        if output.data_ptr() != source.data_ptr():
            output.copy_(source)
        return None

    return call


def _buffers_for_training(get_tensor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """2026-11: with sequence parallelism, an RL step ended in "Inplace update to inference tensor outside
    InferenceMode" once a pass of generation had read more tokens than any pass before it.

    utils.py:628 (0.16.1) keeps the largest buffer that was asked for and gathers every rank's tokens into it.
    If it was allocated inside torch.inference_mode, training may not write to it. Here it is allocated
    outside, wherever the call is. Delete when upstream allocates it so.
    """
    outside = functools.partial(torch.inference_mode, False)

    def call(
        self: GlobalMemoryBuffer,
        tensor_shape: Any,
        dtype: torch.dtype,
        name: str,
        mem_alloc_context: Callable[..., Any] | None = None,
    ) -> Tensor:
        return get_tensor(self, tensor_shape, dtype, name, mem_alloc_context or outside)

    return call


def _write_results_queue() -> Any:
    """2026-11: a rank that was killed after its first save left two processes behind forever.

    dist_checkpointing/strategies/filesystem_async.py:51 (0.16.1) keeps the writers' results in a manager process, which
    does not end with its parent and keeps multiprocessing's resource tracker alive. Delete when upstream has no manager,
    or one that ends.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=end_with_parent)
        filesystem_async._results_queue = manager.Queue()
    return filesystem_async._results_queue


def _l2_norm(
    _chunk: int, _overflow: Tensor, tensor_lists: list[list[Tensor]], _per_tensor: bool, *_: object
) -> tuple[Tensor, None]:
    """2026-11: clipping waited for the device once per gradient tensor.

    utils.py:1205 (0.16.1), the fallback without Transformer Engine and apex, copies the norms one by one to the host. Here
    they stay on the device. Delete when upstream does so.
    """
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.stack(norms).norm().float().view(1), None


def _scale(_chunk: int, _overflow: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """The same for utils.py:1215, which makes a copy of each gradient to scale it."""
    sources, targets = tensor_lists
    torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, scale)


def _clipping() -> dict[str, Callable[..., Any]]:
    """Replacements of Megatron's fallbacks for kernels that are not installed."""
    ours = {
        "l2_norm_impl": (_l2_norm, local_multi_tensor_l2_norm),
        "multi_tensor_scale_impl": (_scale, local_multi_tensor_scale),
    }
    return {name: fix for name, (fix, slow) in ours.items() if getattr(clip_grads, name) is slow}


@contextlib.contextmanager
def megatron_fixes() -> Iterator[None]:
    """Apply the corrections for the length of the ``with`` block.

    Raises:
        ConfigError: the installed megatron-core is none of :data:`TESTED_VERSIONS`.
    """
    version = megatron.core.__version__
    if version.split("+")[0] not in TESTED_VERSIONS:
        raise ConfigError(
            f"megatron-core {version} is not one of the tested versions {', '.join(TESTED_VERSIONS)}; "
            "install megatron-core==0.16.1"
        )
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def load(self, model_param, tensors):
        if self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            return original(self, model_param, tensors)
        return _load_given_keys(self, model_param, tensors)

    buffers = param_and_grad_buffer
    alone: dict[str, Any] = {
        name: _unless_alone(getattr(buffers, name))
        for name in ("dist_all_gather_func", "dist_reduce_scatter_func")
    }
    with (
        mock.patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", load),
        mock.patch.multiple(buffers, **alone),
        mock.patch.dict(vars(clip_grads), _clipping()),
        mock.patch.object(filesystem_async, "_get_write_results_queue", _write_results_queue),
        mock.patch.object(
            GlobalMemoryBuffer, "get_tensor", _buffers_for_training(GlobalMemoryBuffer.get_tensor)
        ),
    ):
        yield
