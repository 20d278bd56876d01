"""Write a Hugging Face folder of random weights in the shape of a preset, for tests and measurements.

python tools/make_random_checkpoint.py --preset ring_lite --output scratch/ring_lite
python tools/make_random_checkpoint.py --preset ring_mini_v2_tiny --dtype fp32 --output scratch/tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ring.checkpoint.convert.files import SummedFile, TensorInfo
from megatron_ring.checkpoint.convert.folders import commit_folder, write_manifest
from megatron_ring.checkpoint.convert.hf_config import config_class_files, hf_config
from megatron_ring.checkpoint.convert.model_map import tensor_map
from megatron_ring.checkpoint.convert.plan import safetensors_files
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsWriter, write_index
from megatron_ring.checkpoint.convert.stream import BUFFER_BYTES, Written
from megatron_ring.config.load import OneLineParser, preset_config
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.presets import PRESETS
from megatron_ring.errors import CheckpointError
from megatron_ring.families import FAMILIES
from megatron_ring.launch.commands.convert import LARGEST_FILE_GB
from megatron_ring.launch.entry import run_entry

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    model = preset_config(args.preset).model
    changes = {
        name: value
        for name, value in (("num_layers", args.num_layers), ("mtp_num_layers", args.mtp_num_layers))
        if value is not None
    }
    if args.num_layers is not None and args.num_layers <= model.first_k_dense_replace:
        raise CheckpointError(
            f"num_layers={args.num_layers} must be above {model.first_k_dense_replace}; try 2"
        )
    if (args.mtp_num_layers or 0) < 0:
        raise CheckpointError(f"mtp_num_layers={args.mtp_num_layers} must not be negative; try 0")
    if not 0 < args.max_file_gb <= LARGEST_FILE_GB:
        raise CheckpointError(
            f"max_file_gb={args.max_file_gb} must be positive and at most {LARGEST_FILE_GB}; try 2"
        )
    if args.output.exists():
        raise CheckpointError(f"{args.output}: exists already; name another folder or remove it")
    size = write_random_checkpoint(
        replace(model, **changes), args.output, DTYPES[args.dtype], int(args.max_file_gb * 1e9), args.seed
    )
    print(json.dumps({"folder": str(args.output), "parameters": size.parameters, "bytes": size.bytes}))


class Size(NamedTuple):
    parameters: int
    bytes: int


def write_random_checkpoint(
    model: ModelConfig, folder: Path, dtype: str, max_file_bytes: int, seed: int
) -> Size:
    """Write a random ``model`` into ``folder``: norms around 1, the expert bias in fp32 around 0, weights by
    init_method_std.

    Raises:
        CheckpointError: the disk is too small, or it failed; then ``folder`` does not exist.
    """
    try:
        return _write(model, folder, dtype, max_file_bytes, seed)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {error.strerror or error}; free space or name another folder"
        ) from None


def _write(model: ModelConfig, folder: Path, dtype: str, max_file_bytes: int, seed: int) -> Size:
    names = tensor_map(model, model.vocab_size).names
    kind = getattr(torch, dtype)
    bias = FAMILIES[model.family].tensors.expert_bias
    infos = {n: TensorInfo(torch.float32 if n.endswith(bias) else kind, s) for n, s in names.items()}
    total = sum(info.num_bytes for info in infos.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < 1.01 * total:
        raise CheckpointError(
            f"{folder}: {free / 1e9:.2f} GB free but the model is {total / 1e9:.2f} GB; free space"
        )
    working = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    generator = torch.Generator().manual_seed(seed)
    files = safetensors_files(infos, max_file_bytes)
    notes: dict[str, Written] = {}
    for file in files:
        sink = SummedFile(working / file.name, lambda _: None)
        writer = SafetensorsWriter(sink, {name: infos[name] for name, _ in file.boxes})
        for name, box in file.boxes:
            for rows in box.rows(BUFFER_BYTES // 4):
                writer.write(name, rows, _random(name, rows.shape, model, generator).to(infos[name].dtype))
        sink.close(durably=True)
        notes[file.name] = Written(sink.num_bytes, f"{sink.crc32:08x}", [])
    contents = {file.name: [name for name, _ in file.boxes] for file in files}
    write_index(working, contents, total)
    write_manifest(working, notes, source=f"random, seed {seed}", family=model.family)
    config = hf_config(model, {}, dtype)
    for name, text in config_class_files(config).items():
        (working / name).write_text(text, encoding="utf-8")
    (working / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    commit_folder(working, folder)
    return Size(sum(info.num_bytes // info.dtype.itemsize for info in infos.values()), total)


def _random(name: str, shape: tuple[int, ...], model: ModelConfig, generator: torch.Generator) -> Tensor:
    values = torch.empty(shape).normal_(generator=generator)
    if name.endswith(("norm.weight", "layernorm.weight")):
        return 1 + 0.1 * values
    bias = FAMILIES[model.family].tensors.expert_bias
    return values * (0.01 if name.endswith(bias) else model.init_method_std)


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), required=True, help="whose shape")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not exist yet")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="of the weights (default: bf16)"
    )
    parser.add_argument("--num-layers", type=int, help="number of layers instead of the preset's")
    parser.add_argument(
        "--mtp-num-layers", type=int, help="multi-token-prediction layers instead of the preset's"
    )
    parser.add_argument("--max-file-gb", type=float, default=2.0, help="largest file (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    run_entry(main)
