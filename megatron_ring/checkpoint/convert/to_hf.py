"""Megatron to Hugging Face: a model folder that engines load, from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ring.checkpoint import folder as run_folder
from megatron_ring.checkpoint.convert import stream
from megatron_ring.checkpoint.convert.check import check_tensors, target_infos
from megatron_ring.checkpoint.convert.conversion import Options, Reporter, common_dtype, run, verify
from megatron_ring.checkpoint.convert.folders import (
    HF_FILES,
    commit_folder,
    copy_hf_assets,
    find_checkpoint,
    run_config_of,
    token_ids,
    write_manifest,
)
from megatron_ring.checkpoint.convert.hf_config import config_class_files, hf_config, read_hf_config
from megatron_ring.checkpoint.convert.model_map import EMBEDDING, HEAD, tensor_map
from megatron_ring.checkpoint.convert.plan import safetensors_files
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder, write_index
from megatron_ring.checkpoint.convert.stream import BUFFER_BYTES, Job
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.checkpoint.convert.torch_dist_io import TorchDistFolder
from megatron_ring.config.model import ModelConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.families import FAMILIES
from megatron_ring.families.shared import NORM_HEAD_EPSILON

_OPTIMIZER, _MTP = "optimizer.", "mtp."


@dataclass(frozen=True, kw_only=True)
class Export:
    """What goes into a Hugging Face folder besides the weights. Example: ``Export(without_mtp=True)``."""

    hf_files: Path | None = None
    """Folder whose config.json and tokenizer are copied; None means ``hf`` beside the steps."""
    config_file: Path | None = None
    """TOML that describes the model; None means the one beside the weights."""
    normalize_head: bool = False
    """Apply NormHead to ``lm_head.weight`` and say ``norm_head: false``, for engines that do not know it."""
    without_mtp: bool = False
    """Leave multi-token-prediction layers out, for engines that refuse them (vLLM 0.32 does)."""


def megatron_to_hf(
    source_path: Path, target: Path, options: Options, reporter: Reporter, export: Export | None = None
) -> Path:
    """Write the Hugging Face folder ``target`` from a checkpoint (a run's folder means its latest).

    Raises:
        CheckpointError: bad input, no room, or ``target`` holds something already; nothing half-written has
        its name.
    """
    export = export or Export()
    # a symbolic link to a folder on another disk stays, and its target is made
    target = target.resolve() if target.is_symlink() else target
    folder = find_checkpoint(source_path)
    config = run_config_of(folder, export.config_file)
    model = replace(config.model, mtp_num_layers=0) if export.without_mtp else config.model
    source = TorchDistFolder(folder)
    if HEAD in source.tensors and source.tensors[HEAD].shape[0] == 1:
        raise CheckpointError(
            f"{folder}: its output layer has one row, so it is a critic, which no engine reads; name the policy's folder"
        )
    mapping = tensor_map(model, _vocab_rows(source, model))
    ignored = (_OPTIMIZER, _MTP) if export.without_mtp else (_OPTIMIZER,)
    extra = [key for key in source.tensors if key not in mapping.keys and not key.startswith(ignored)]
    check_tensors(source, mapping.keys, model, extra)
    infos = target_infos(source, mapping.into_names, mapping.names, options.dtype)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; name another folder or remove it")
    files_from = export.hf_files or run_folder.beside(folder, HF_FILES) or folder.parent / HF_FILES
    base = read_hf_config(files_from) if export.hf_files or (files_from / "config.json").exists() else {}
    normalize = export.normalize_head and model.norm_head
    ids = {} if base else token_ids(files_from, config.data, model.vocab_size)
    theirs = hf_config(
        replace(model, norm_head=model.norm_head and not normalize), base, common_dtype(infos), ids
    )
    job = Job(
        source=folder,
        source_format="torch_dist",
        target_format="safetensors",
        copies=mapping.into_names,
        tensors=infos,
        files=safetensors_files(infos, options.max_file_bytes),
        scales=head_scale(source, model) if normalize else {},
    )
    working = target.with_name(target.name + ".incomplete")
    with stream.working_folder(working):
        notes = run(job, working, options, reporter)
        if files_from.is_dir():
            copy_hf_assets(files_from, working)
        if not base:
            said = ", ".join(f"{name}={value}" for name, value in ids.items())
            reporter.say(
                "no config.json to carry over (--hf-files): it is made anew, "
                + (
                    f"with the tokenizer's {said}"
                    if ids
                    else "without pad and eos tokens: no tokenizer is at hand"
                )
            )
        _finish_hf(job, working, theirs)
        write_manifest(working, notes, source=str(folder), source_format="torch_dist", family=model.family)
        if options.verify:
            copies = {key: c for key, c in mapping.into_keys.items() if c[0].source not in job.scales}
            verify(source, SafetensorsFolder(working), copies, reporter)
        stream.remove_progress_notes(working)
        if target.exists():
            target.rmdir()
        commit_folder(working, target)
    return target


def _finish_hf(job: Job, working: Path, config: dict[str, Any]) -> None:
    """Write config.json, the code that reads it, and the index."""
    for name, text in config_class_files(config).items():
        (working / name).write_text(text, encoding="utf-8")
    (working / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    contents = {file.name: list(dict.fromkeys(name for name, _ in file.boxes)) for file in job.files}
    write_index(working, contents, sum(info.num_bytes for info in job.tensors.values()))


def _vocab_rows(source: TorchDistFolder, model: ModelConfig) -> int:
    """Rows of the embedding as it was saved: whatever padding it has, never fewer than the vocabulary."""
    rows = source.tensors[EMBEDDING].shape[0] if EMBEDDING in source.tensors else 0
    return max(rows, model.vocab_size)


def head_scale(source: TorchDistFolder, model: ModelConfig) -> dict[str, Tensor]:
    """1 / (norm + epsilon) of every column of the head over the real vocabulary, [D]."""
    V, D = model.vocab_size, source.tensors[HEAD].shape[1]
    squares_D = torch.zeros(D)
    for box in Box.whole((V, D)).rows(BUFFER_BYTES // 4):
        for _, view in source.views(HEAD, box):
            squares_D += view.float().square().sum(0)
    head = f"{FAMILIES[model.family].tensors.head}.weight"
    return {head: 1.0 / (squares_D.sqrt() + NORM_HEAD_EPSILON)}
