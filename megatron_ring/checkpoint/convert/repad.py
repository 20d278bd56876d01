"""Megatron to Megatron: a checkpoint with other vocabulary padding and other files, optimizer and critic included.

Any layout reads any checkpoint whose vocabulary padding it shares: this is for the padding, not for the layout.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from megatron_ring.checkpoint import folder as run_folder
from megatron_ring.checkpoint.convert import stream
from megatron_ring.checkpoint.convert.conversion import (
    Options,
    Reporter,
    finish_step,
    run,
    verify,
    write_torch_dist_metadata,
)
from megatron_ring.checkpoint.convert.files import TensorInfo
from megatron_ring.checkpoint.convert.folders import (
    HF_FILES,
    copy_hf_assets,
    find_checkpoint,
    require_no_checkpoints,
    run_config_of,
    write_manifest,
)
from megatron_ring.checkpoint.convert.model_map import EMBEDDING, HEAD
from megatron_ring.checkpoint.convert.plan import torch_dist_files
from megatron_ring.checkpoint.convert.stream import Job
from megatron_ring.checkpoint.convert.tensor_map import Box, TensorCopy
from megatron_ring.checkpoint.convert.torch_dist_io import TorchDistFolder
from megatron_ring.checkpoint.format import TrainerState
from megatron_ring.config.model_stats import padded_vocab_size


def repad(
    source_path: Path,
    target: Path,
    options: Options,
    reporter: Reporter,
    divisible_by: int | None,
    tensor_size: int,
) -> Path:
    """Write a checkpoint again with other vocabulary padding and other files, optimizer and critic included.

    Raises:
        CheckpointError: bad input, no room, or ``target`` holds something already; nothing half-written has
        its name.
    """
    own, *critics = run_folder.parts_of(find_checkpoint(source_path))
    require_no_checkpoints(target)
    # as in training, the critic first: a policy that is renamed into place has its critic
    for critic in critics:
        _repad(critic, target / run_folder.CRITIC, options, reporter, divisible_by, tensor_size)
    return _repad(own, target, options, reporter, divisible_by, tensor_size)


def _repad(
    folder: Path,
    target: Path,
    options: Options,
    reporter: Reporter,
    divisible_by: int | None,
    tensor_size: int,
) -> Path:
    """One checkpoint of :func:`repad`; a finished one of the same step is replaced."""
    config = run_config_of(folder, None)
    model = config.model
    if divisible_by is not None:
        model = replace(model, make_vocab_size_divisible_by=divisible_by)
    source = TorchDistFolder(folder)
    rows = padded_vocab_size(model, tensor_size)
    copies: dict[str, list[TensorCopy]] = {}
    infos: dict[str, TensorInfo] = {}
    for key, info in source.tensors.items():
        shape = info.shape
        kept = Box.whole(shape)
        # a critic's head has one row, whatever the vocabulary
        if key.endswith(EMBEDDING) or (key.endswith(HEAD) and shape[0] > 1):
            kept = Box.whole((model.vocab_size, *shape[1:]))
            shape = (rows, *shape[1:])
        copies[key] = [TensorCopy(key, kept, key, kept)]
        infos[key] = TensorInfo(info.dtype, shape)
    if source.objects:
        reporter.say(
            f"{len(source.objects)} _extra_state objects dropped: only Transformer Engine or apex would know them"
        )
    state = TrainerState.read(folder)
    job = Job(
        source=folder,
        source_format="torch_dist",
        target_format="torch_dist",
        copies=copies,
        tensors=infos,
        files=torch_dist_files(infos, options.max_file_bytes),
    )
    iteration = state.iteration
    working = run_folder.folder_of(target, iteration)
    working = working.with_name(working.name + ".incomplete")
    with stream.working_folder(working):
        notes = run(job, working, options, reporter)
        write_torch_dist_metadata(job, working, notes)
        for path in folder.iterdir():
            if path.suffix == ".safetensors" and path.is_file():
                shutil.copyfile(path, working / path.name)
        finish_step(working, state, replace(config, model=model))
        write_manifest(
            working, notes, source=str(folder.absolute()), source_format="torch_dist", family=model.family
        )
        if options.verify:
            verify(source, TorchDistFolder(working), copies, reporter)
        if files_from := run_folder.beside(folder, HF_FILES):
            (target / HF_FILES).mkdir(exist_ok=True)
            copy_hf_assets(files_from, target / HF_FILES)
        stream.remove_progress_notes(working)
        return run_folder.commit(working, iteration)
