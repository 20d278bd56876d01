"""Hugging Face to Megatron: step 0 of a run folder from a model folder."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from megatron_ring.checkpoint import folder as run_folder
from megatron_ring.checkpoint.convert import stream
from megatron_ring.checkpoint.convert.check import check_tensors, target_infos
from megatron_ring.checkpoint.convert.conversion import (
    Options,
    Reporter,
    common_dtype,
    finish_step,
    run,
    verify,
    write_torch_dist_metadata,
)
from megatron_ring.checkpoint.convert.files import TensorInfo
from megatron_ring.checkpoint.convert.folders import (
    HF_FILES,
    copy_hf_assets,
    must_be_whole,
    require_no_checkpoints,
    write_manifest,
)
from megatron_ring.checkpoint.convert.hf_config import defaults_taken, model_config, read_hf_config
from megatron_ring.checkpoint.convert.model_map import tensor_map
from megatron_ring.checkpoint.convert.plan import torch_dist_files
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder
from megatron_ring.checkpoint.convert.stream import BUFFER_BYTES, Job
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.checkpoint.convert.torch_dist_io import TorchDistFolder
from megatron_ring.checkpoint.format import CONVERTED, TrainerState
from megatron_ring.config.dump import flat
from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.model_stats import padded_vocab_size
from megatron_ring.config.run import RunConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.families import FAMILIES


def hf_to_megatron(
    source_folder: Path,
    target: Path,
    options: Options,
    reporter: Reporter,
    divisible_by: int = 128,
    tensor_size: int = 1,
) -> Path:
    """Write step 0 of a run folder ``target`` from a Hugging Face folder; returns the step's folder.

    ``divisible_by`` and ``tensor_size`` decide the vocabulary padding, as in training.

    Raises:
        CheckpointError: bad input, no room, or ``target`` holds something already; nothing half-written has
        its name.
    """
    theirs, origin = read_hf_config(source_folder), str(source_folder / "config.json")
    model = replace(model_config(theirs, origin), make_vocab_size_divisible_by=divisible_by)
    must_be_whole(source_folder)
    source = SafetensorsFolder(source_folder)
    if taken := defaults_taken(theirs, origin):
        said = ", ".join(f"{name}={value}" for name, value in taken.items())
        reporter.say(f"{origin} leaves out what its class then takes: {said}")
    mapping = tensor_map(model, padded_vocab_size(model, tensor_size))
    extra = source.tensors.keys() - mapping.names.keys()
    if not model.untie_embeddings_and_output_weights:
        extra -= _repeated_head(source, model, reporter)
    check_tensors(source, mapping.names, model, extra)
    infos = target_infos(source, mapping.into_keys, mapping.keys, options.dtype)
    require_no_checkpoints(target)
    config = _run_config(model, infos)
    job = Job(
        source=source_folder,
        source_format="safetensors",
        target_format="torch_dist",
        copies=mapping.into_keys,
        tensors=infos,
        files=torch_dist_files(infos, options.max_file_bytes),
    )
    working = run_folder.folder_of(target, 0)
    working = working.with_name(working.name + ".incomplete")
    with stream.working_folder(working):
        notes = run(job, working, options, reporter)
        write_torch_dist_metadata(job, working, notes)
        state = TrainerState(
            iteration=0,
            optimizer_steps=0,
            # marks a checkpoint without random-number states
            layout={"world_size": 0},
            model=asdict(model),
            stage=CONVERTED,
            trainer={},
        )
        finish_step(working, state, config)
        write_manifest(
            working, notes, source=str(source_folder), source_format="safetensors", family=model.family
        )
        if options.verify:
            verify(source, TorchDistFolder(working), mapping.into_names, reporter, padded=mapping.into_keys)
        (target / HF_FILES).mkdir(exist_ok=True)
        copy_hf_assets(source_folder, target / HF_FILES)
        stream.remove_progress_notes(working)
        return run_folder.commit(working, 0)


def _repeated_head(source: SafetensorsFolder, model: ModelConfig, reporter: Reporter) -> set[str]:
    """The name of a head that repeats the embedding of a model with tied embeddings, as some published folders have
    it; empty without one.

    Raises:
        CheckpointError: it is another tensor, which engines would ignore.
    """
    names = FAMILIES[model.family].tensors
    head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
    if head not in source.tensors or embedding not in source.tensors:
        return set()
    info, whole = source.tensors[head], Box.whole(source.tensors[head].shape)
    same = info == source.tensors[embedding]
    for box in whole.rows(BUFFER_BYTES // info.dtype.itemsize) if same else ():
        ((_, own),), ((_, other),) = source.views(head, box), source.views(embedding, box)
        same = same and torch.equal(own, other)
    if not same:
        raise CheckpointError(
            f"{source.folder}: {head} is not {embedding}, although config.json ties them (tie_word_embeddings), and "
            "engines would drop it; say false there, or remove it"
        )
    reporter.say(f"{head} repeats {embedding}, which is the head (tie_word_embeddings): it is kept once")
    return {head}


def _run_config(model: ModelConfig, infos: dict[str, TensorInfo]) -> RunConfig:
    """A run's configuration for the converted model, in its precision."""
    values = {name: value for name, value in asdict(model).items() if name in flat(RunConfig())}
    return config_from_mapping({**values, "bf16": common_dtype(infos) != "float32"})
