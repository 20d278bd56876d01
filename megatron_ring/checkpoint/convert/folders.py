"""The files beside the tensors: tokenizer and config files of a model, and the manifest of a conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ring import __version__
from megatron_ring.checkpoint import folder as run_folder
from megatron_ring.checkpoint.checksums import MANIFEST, SUMS, compare, read_sums, write_sums
from megatron_ring.checkpoint.convert.stream import Written
from megatron_ring.checkpoint.format import RUN_CONFIG
from megatron_ring.checkpoint.run_lock import must_be_mine
from megatron_ring.config.load import config_from_mapping, read_toml
from megatron_ring.config.run import DataConfig, RunConfig
from megatron_ring.data.text.tokenizer import load_tokenizer
from megatron_ring.durable import fsync
from megatron_ring.errors import CheckpointError, ConfigError, DataError

HF_FILES = "hf"
"""Folder beside the steps of a Megatron checkpoint that keeps what a Hugging Face folder needs besides
weights.
"""
ADAPTER = "adapter_config.json"
"""transformers loads the base model that it names, and not the weights beside it."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
_OF_OTHER_WEIGHTS = (ADAPTER, "hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files that engines use if they are beside a model; they describe weights that are not converted."""
_MAX_BYTES = 100_000_000


def copy_hf_assets(source: Path, target: Path) -> list[str]:
    """Copy everything but weights (config, tokenizer, chat template, model code) between flat folders."""
    carried = []
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        is_of_others = path.name in (MANIFEST, SUMS, *_OF_OTHER_WEIGHTS)
        if (
            not path.is_file()
            or is_weight
            or is_of_others
            or path.name.startswith(".")
            or path.stat().st_size > _MAX_BYTES
        ):
            continue
        shutil.copyfile(path, target / path.name)
        carried.append(path.name)
    return carried


def must_be_whole(source: Path) -> None:
    """Refuse a Hugging Face folder whose config and weights are not the whole model.

    Raises:
        CheckpointError: it is a base with an adapter, or a file that would be copied is missing.
    """
    if (source / ADAPTER).exists():
        raise CheckpointError(
            f"{source / ADAPTER}: the model is a base with an adapter, which is not read; merge them (peft's "
            "merge_and_unload), or remove what is left of an adapter that is merged"
        )
    for path in sorted(source.iterdir()):
        if path.is_symlink() and not path.exists() and path.suffix not in _WEIGHTS:
            raise CheckpointError(f"{path}: a link to nothing; complete the download, or remove the link")


def token_ids(files: Path, data: DataConfig, vocab_size: int) -> dict[str, int]:
    """``pad_token_id`` and ``eos_token_id`` of the tokenizer in ``files``, or else of the run's; empty without one.

    Raises:
        CheckpointError: it cannot be read, or has more tokens than the model.
    """
    kind, path = data.tokenizer_type, Path(data.tokenizer_model) if data.tokenizer_model else None
    if (files / "tokenizer.json").is_file() and (files / "tokenizer_config.json").is_file():
        kind, path = "huggingface", files
    if path is None or not path.exists():
        return {}
    try:
        tokenizer = load_tokenizer(kind, path, vocab_size=vocab_size)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    return {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}


def require_no_checkpoints(root: Path) -> None:
    """Refuse a run folder that holds checkpoints already.

    Raises:
        CheckpointError: it does, or it is no folder.
    """
    if root.exists() and not root.is_dir():
        raise CheckpointError(f"{root}: is a file; name a folder")
    must_be_mine(root)
    if (root / run_folder.TRACKER).exists() or (root.is_dir() and run_folder.iterations(root)):
        raise CheckpointError(f"{root}: holds checkpoints already; name another folder or remove it")


def commit_folder(working: Path, target: Path) -> None:
    """Sum every file of ``working``, make them durable and give the folder its name."""
    write_sums(working, {})
    for path in [*working.iterdir(), working]:
        fsync(path)
    working.rename(target)
    fsync(target.parent)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that ``path`` is, or whose latest it holds.

    Raises:
        CheckpointError: neither.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a checkpoint folder or one that a run saved to")
    if (path / ".metadata").exists():
        return path
    latest = run_folder.latest(path)
    if latest is None:
        raise CheckpointError(
            f"{path}: neither .metadata nor {run_folder.TRACKER} is there; name a torch_dist checkpoint or the folder "
            "of a run"
        )
    return latest


def run_config_of(folder: Path, config_file: Path | None) -> RunConfig:
    """The configuration saved beside a checkpoint, or the one in ``config_file``.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = config_file or folder / RUN_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; name the model's configuration with --config FILE.toml")
    try:
        _, values = read_toml(path)
        return config_from_mapping(values)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def write_manifest(folder: Path, files: dict[str, Written], **facts: Any) -> None:
    """``conversion.json``: where the files came from, and the length and CRC-32 of each."""
    manifest = {
        "written_by": f"megatron_ring {__version__}",
        **facts,
        "files": {
            name: {"bytes": note.num_bytes, "crc32": note.crc32} for name, note in sorted(files.items())
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> int:
    """Sum every file that ``conversion.json`` lists again; returns the bytes read.

    Raises:
        CheckpointError: no manifest, or a file is missing or differs.
    """
    sums = read_sums(folder, MANIFEST)
    for name, wrong in compare(folder, sums):
        if wrong:
            raise CheckpointError(f"{folder / name}: {wrong}; copy it again")
    return sum(each.num_bytes for each in sums.values())
