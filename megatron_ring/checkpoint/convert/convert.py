"""The conversions: Hugging Face to Megatron, Megatron to Hugging Face, and Megatron to Megatron."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ring.checkpoint import folder as folders
from megatron_ring.checkpoint.convert import stream
from megatron_ring.checkpoint.convert.check import check_tensors, target_infos
from megatron_ring.checkpoint.convert.families import tensor_map
from megatron_ring.checkpoint.convert.files import Source, TensorInfo
from megatron_ring.checkpoint.convert.folders import (
    HF_FILES,
    carry_over,
    commit_folder,
    find_checkpoint,
    must_be_whole,
    require_no_checkpoints,
    run_config_of,
    token_ids,
    write_manifest,
)
from megatron_ring.checkpoint.convert.hf_config import (
    config_class_files,
    defaults_taken,
    hf_config,
    model_config,
    read_hf_config,
)
from megatron_ring.checkpoint.convert.plan import safetensors_files, torch_dist_files
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder, write_index
from megatron_ring.checkpoint.convert.stream import BUFFER_BYTES, Job, Written
from megatron_ring.checkpoint.convert.tensor_map import Box, Copy
from megatron_ring.checkpoint.convert.torch_dist_io import TorchDistFolder, write_metadata
from megatron_ring.checkpoint.convert.verify import compare, padding_is_zero
from megatron_ring.checkpoint.format import CONVERTED, RUN_CONFIG, TrainerState
from megatron_ring.config.dump import dump_toml, flat
from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.model_stats import padded_vocab_size
from megatron_ring.config.run import RunConfig
from megatron_ring.errors import CheckpointError

_OPTIMIZER, _MTP = "optimizer.", "mtp."
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_CONTENT = {
    "content_metadata": {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
    }
}
"""What Megatron keeps in common.pt about how the tensors are laid out."""
_NORM_EPSILON = 1e-7
"""NormHead: each column of the head is divided by its norm over the vocabulary plus this."""


class Reporter(Protocol):
    """Who hears how a conversion goes."""

    def say(self, line: str) -> None: ...

    def progress(self, title: str, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert. Example: ``Options(dtype=None, max_file_bytes=2_000_000_000, num_workers=2,
    verify=True)``.
    """

    dtype: torch.dtype | None = None
    """Cast floating-point tensors (all but the expert bias) to this; None keeps each as it is."""
    max_file_bytes: int = 2_000_000_000
    """Largest output file; a single larger tensor gets its own."""
    num_workers: int = 1
    """Processes that convert."""
    verify: bool = False
    """Read both sides back and compare before the result gets its name."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What goes into a Hugging Face folder besides the weights. Example: ``Export(without_mtp=True)``."""

    hf_files: Path | None = None
    """Folder whose config.json and tokenizer go along; None means ``hf`` beside the steps."""
    config_file: Path | None = None
    """TOML that describes the model; None means the one beside the weights."""
    normalize_head: bool = False
    """Apply NormHead to ``lm_head.weight`` and say ``norm_head: false``, for engines that do not know it."""
    without_mtp: bool = False
    """Leave multi-token-prediction layers out, for engines that refuse them (vLLM 0.32 does)."""


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
    check_tensors(source, mapping.names, model, source.tensors.keys() - mapping.names.keys())
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
    working = folders.folder_of(target, 0)
    working = working.with_name(working.name + ".incomplete")
    with stream.working_folder(working):
        notes = _run(job, working, options, reporter)
        _write_metadata(job, working, notes)
        state = TrainerState(
            iteration=0,
            optimizer_steps=0,
            # the layout of no run, so that none looks for random-number states
            layout={"world_size": 0},
            model=asdict(model),
            stage=CONVERTED,
            trainer={},
        )
        _finish_step(working, state, config)
        write_manifest(
            working, notes, source=str(source_folder), source_format="safetensors", family=model.family
        )
        if options.verify:
            _verify(source, TorchDistFolder(working), mapping.into_names, reporter, padded=mapping.into_keys)
        (target / HF_FILES).mkdir(exist_ok=True)
        carry_over(source_folder, target / HF_FILES)
        stream.remove_progress_notes(working)
        return folders.commit(working, 0)


def megatron_to_hf(
    source_path: Path, target: Path, options: Options, reporter: Reporter, export: Export | None = None
) -> Path:
    """Write the Hugging Face folder ``target`` from a checkpoint (a run's folder means its latest).

    Raises:
        CheckpointError: bad input, no room, or ``target`` holds something already; nothing half-written has
        its name.
    """
    export = export or Export()
    # a link to a folder on another disk stays, and what it names is what is made
    target = target.resolve() if target.is_symlink() else target
    folder = find_checkpoint(source_path)
    config = run_config_of(folder, export.config_file)
    model = replace(config.model, mtp_num_layers=0) if export.without_mtp else config.model
    source = TorchDistFolder(folder)
    mapping = tensor_map(model, _vocab_rows(source, model))
    ignored = (_OPTIMIZER, _MTP) if export.without_mtp else (_OPTIMIZER,)
    extra = [key for key in source.tensors if key not in mapping.keys and not key.startswith(ignored)]
    check_tensors(source, mapping.keys, model, extra)
    infos = target_infos(source, mapping.into_names, mapping.names, options.dtype)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; name another folder or remove it")
    files_from = export.hf_files or folders.beside(folder, HF_FILES) or folder.parent / HF_FILES
    base = read_hf_config(files_from) if export.hf_files or (files_from / "config.json").exists() else {}
    normalize = export.normalize_head and model.norm_head
    ids = {} if base else token_ids(files_from, config.data, model.vocab_size)
    theirs = hf_config(
        replace(model, norm_head=model.norm_head and not normalize), base, _common_dtype(infos), ids
    )
    job = Job(
        source=folder,
        source_format="torch_dist",
        target_format="safetensors",
        copies=mapping.into_names,
        tensors=infos,
        files=safetensors_files(infos, options.max_file_bytes),
        scales=_head_scale(source, model.vocab_size) if normalize else {},
    )
    working = target.with_name(target.name + ".incomplete")
    with stream.working_folder(working):
        notes = _run(job, working, options, reporter)
        if files_from.is_dir():
            carry_over(files_from, working)
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
            _verify(source, SafetensorsFolder(working), copies, reporter)
        stream.remove_progress_notes(working)
        if target.exists():
            target.rmdir()
        commit_folder(working, target)
    return target


def reshard(
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
    own, *critics = folders.parts_of(find_checkpoint(source_path))
    require_no_checkpoints(target)
    # as in training, a policy that has its name has its critic
    for critic in critics:
        _reshard(critic, target / folders.CRITIC, options, reporter, divisible_by, tensor_size)
    return _reshard(own, target, options, reporter, divisible_by, tensor_size)


def _reshard(
    folder: Path,
    target: Path,
    options: Options,
    reporter: Reporter,
    divisible_by: int | None,
    tensor_size: int,
) -> Path:
    """One checkpoint of :func:`reshard`; a finished one of the same step is replaced."""
    config = run_config_of(folder, None)
    model = config.model
    if divisible_by is not None:
        model = replace(model, make_vocab_size_divisible_by=divisible_by)
    source = TorchDistFolder(folder)
    rows = padded_vocab_size(model, tensor_size)
    copies: dict[str, list[Copy]] = {}
    infos: dict[str, TensorInfo] = {}
    for key, info in source.tensors.items():
        shape = info.shape
        kept = Box.whole(shape)
        # a critic's head has one row, whatever the vocabulary
        if key.endswith(_EMBEDDING) or (key.endswith(_HEAD) and shape[0] > 1):
            kept = Box.whole((model.vocab_size, *shape[1:]))
            shape = (rows, *shape[1:])
        copies[key] = [Copy(key, kept, key, kept)]
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
    working = folders.folder_of(target, iteration)
    working = working.with_name(working.name + ".incomplete")
    with stream.working_folder(working):
        notes = _run(job, working, options, reporter)
        _write_metadata(job, working, notes)
        for path in folder.iterdir():
            if path.suffix == ".safetensors" and path.is_file():
                shutil.copyfile(path, working / path.name)
        _finish_step(working, state, replace(config, model=model))
        write_manifest(
            working, notes, source=str(folder.absolute()), source_format="torch_dist", family=model.family
        )
        if options.verify:
            _verify(source, TorchDistFolder(working), copies, reporter)
        if files_from := folders.beside(folder, HF_FILES):
            (target / HF_FILES).mkdir(exist_ok=True)
            carry_over(files_from, target / HF_FILES)
        stream.remove_progress_notes(working)
        return folders.commit(working, iteration)


def _run(job: Job, working: Path, options: Options, reporter: Reporter) -> dict[str, Written]:
    """Write all files of ``job``, or those that are still missing."""
    todo = stream.begin(job, working, reporter.say)
    with reporter.progress("converting", sum(file.num_bytes for file in todo)) as on_bytes:
        stream.write(job, working, todo, options.num_workers, on_bytes)
    return stream.written(job, working)


def _verify(
    original: Source,
    result: Source,
    copies: dict[str, list[Copy]],
    reporter: Reporter,
    padded: dict[str, list[Copy]] | None = None,
) -> None:
    """Compare, and look at the vocabulary padding of ``padded``. What differs is not resumed from.

    Raises:
        CheckpointError: something differs.
    """
    total = sum(
        copy.target_box.size * original.tensors[name].dtype.itemsize
        for name in copies
        for copy in copies[name]
    )
    try:
        with reporter.progress("verifying", total) as on_bytes:
            comparison = compare(original, result, copies, on_bytes)
        if padded and not padding_is_zero(result, padded):
            raise CheckpointError(f"{result.folder}: vocabulary padding is not zero; convert again")
    except CheckpointError:
        stream.remove_progress_notes(result.folder)
        raise
    reporter.say(f"verified: {comparison}")


def _write_metadata(job: Job, working: Path, notes: dict[str, Written]) -> None:
    places = ((file, *place) for file, note in notes.items() for place in note.places)
    write_metadata(working, job.tensors, places, _CONTENT)


def _finish_hf(job: Job, working: Path, config: dict[str, Any]) -> None:
    """Write config.json, the code that reads it, and the index."""
    for name, text in config_class_files(config).items():
        (working / name).write_text(text, encoding="utf-8")
    (working / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    contents = {file.name: list(dict.fromkeys(name for name, _ in file.boxes)) for file in job.files}
    write_index(working, contents, sum(info.num_bytes for info in job.tensors.values()))


def _finish_step(working: Path, state: TrainerState, config: RunConfig) -> None:
    state.write(working)
    (working / RUN_CONFIG).write_text(dump_toml(config), encoding="utf-8")


def _common_dtype(infos: dict[str, TensorInfo]) -> str:
    """The dtype that most numbers have, as config files spell it."""
    bytes_of: dict[torch.dtype, int] = {}
    for info in infos.values():
        bytes_of[info.dtype] = bytes_of.get(info.dtype, 0) + info.num_bytes
    return str(max(bytes_of, key=bytes_of.__getitem__)).removeprefix("torch.")


def _vocab_rows(source: TorchDistFolder, model: ModelConfig) -> int:
    """Rows of the embedding as it was saved: whatever padding it has, never fewer than the vocabulary."""
    rows = source.tensors[_EMBEDDING].shape[0] if _EMBEDDING in source.tensors else 0
    return max(rows, model.vocab_size)


def _head_scale(source: TorchDistFolder, vocab_size: int) -> dict[str, Tensor]:
    """1 / (norm + epsilon) of every column of the head over the real vocabulary, [D]."""
    V, D = vocab_size, source.tensors[_HEAD].shape[1]
    squares_D = torch.zeros(D)
    for box in Box.whole((V, D)).rows(BUFFER_BYTES // 4):
        for _, view in source.views(_HEAD, box):
            squares_D += view.float().square().sum(0)
    return {"lm_head.weight": 1.0 / (squares_D.sqrt() + _NORM_EPSILON)}


def _run_config(model: ModelConfig, infos: dict[str, TensorInfo]) -> RunConfig:
    """A run's configuration for the converted model, in its precision."""
    values = {name: value for name, value in asdict(model).items() if name in flat(RunConfig())}
    return config_from_mapping({**values, "bf16": _common_dtype(infos) != "float32"})
