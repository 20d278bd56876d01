"""Check that a checkpoint's tensors match the model."""

from __future__ import annotations

from collections.abc import Collection

import torch

from megatron_ring.checkpoint.convert.files import Source, TensorInfo
from megatron_ring.checkpoint.convert.model_map import EXPERT_BIAS
from megatron_ring.checkpoint.convert.tensor_map import Shape, TensorCopy
from megatron_ring.config.model import ModelConfig
from megatron_ring.errors import CheckpointError


def check_tensors(
    source: Source, wanted: dict[str, Shape], model: ModelConfig, extra: Collection[str]
) -> None:
    """Refuse a source whose tensors are not exactly ``wanted``; ``extra`` are those it has besides.

    Raises:
        CheckpointError: missing or extra tensors, or wrong shapes.
    """
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise CheckpointError(
            f"{source.folder}: {_some(missing)} missing for a {model.family} of {model.num_layers} layers; "
            "complete the download, or correct the config"
        )
    if extra:
        raise CheckpointError(
            f"{source.folder}: {_some(sorted(extra))} not part of a {model.family} of {model.num_layers} layers "
            f"(mtp_num_layers={model.mtp_num_layers}, norm_head={model.norm_head}); correct the config"
        )
    for name, shape in wanted.items():
        found = source.tensors[name].shape
        if found != shape:
            raise CheckpointError(
                f"{source.folder}: {name} is {list(found)} but the config makes it {list(shape)}; correct the config"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def target_infos(
    source: Source, copies: dict[str, list[TensorCopy]], shapes: dict[str, Shape], dtype: torch.dtype | None
) -> dict[str, TensorInfo]:
    """Shape and dtype of every target tensor: its sources' own dtype, or ``dtype`` for all but the expert
    bias.

    Raises:
        CheckpointError: one target's sources have different dtypes.
    """
    infos: dict[str, TensorInfo] = {}
    for name, shape in shapes.items():
        kinds = {source.tensors[copy.source].dtype for copy in copies[name]}
        is_bias = any(key.endswith(EXPERT_BIAS) for key in (name, copies[name][0].source))
        if dtype is not None and not is_bias:
            kinds = {dtype}
        if len(kinds) > 1:
            raise CheckpointError(
                f"{source.folder}: the parts of {name} have dtypes {', '.join(sorted(map(str, kinds)))}; "
                "choose one with --dtype"
            )
        infos[name] = TensorInfo(kinds.pop(), shape)
    return infos
