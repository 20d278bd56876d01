"""What is saved comes back bit for bit; what cannot be saved or loaded is one line and harms nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint import checkpointer as module
from megatron_ring.checkpoint import folder as folders
from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.checkpoint.format import CONVERTED, TRAINER_STATE, TrainerState, check_contents
from megatron_ring.errors import CheckpointError
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.checkpoint.checkpoints import NAME, TRAINER, checkpointer, state_of
from tests.helpers.model.small import batch, config_of, weights

OBJECTIVE = NextTokenObjective()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[torch.Tensor], torch.Tensor]:
    """A checkpoint after two steps, what it should hold, and what the generator gives next."""
    root = tmp_path_factory.mktemp("saved") / "run"
    with checkpointer(save=str(root), bf16=True, moe_router_warmup_iters=9) as writer:
        for _ in range(2):
            writer.engine.step(batch(), OBJECTIVE, 1e-2, warmup=0.5)
        torch.rand(17)
        writer.save(3, TRAINER)
        return root, state_of(writer.engine), torch.rand(5)


SAME = {"bf16": True, "moe_router_warmup_iters": 9}


@pytest.fixture
def root(saved, tmp_path) -> Path:
    """A copy of the saved run to do damage to."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def one_line(caught: pytest.ExceptionInfo[CheckpointError], *parts: str) -> None:
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def load_fails(root: Path, *parts: str, untouched: bool = True, **settings) -> None:
    with checkpointer(seed=2, load=str(root), **{**SAME, **settings}) as reader:
        before = state_of(reader.engine)
        with pytest.raises(CheckpointError) as caught:
            reader.load(root)
        assert not untouched or all(map(torch.equal, before, state_of(reader.engine)))
    one_line(caught, *parts)


def test_everything_comes_back_bit_for_bit(saved):
    root, state, drawn = saved
    with checkpointer(seed=2, load=str(root), **SAME) as reader:
        assert reader.load(root) == TRAINER
        assert all(map(torch.equal, state_of(reader.engine), state))
        assert torch.equal(torch.rand(5), drawn)
        second = reader.engine.step(batch(seed=9), OBJECTIVE, 1e-2)
    with checkpointer(seed=3, load=str(root), **SAME) as reader:
        assert reader.load(root / NAME) == TRAINER, "a step's own folder may be named too"
        assert reader.engine.step(batch(seed=9), OBJECTIVE, 1e-2) == second


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_beside_the_weights_comes_back_and_alarms_nobody(tmp_path, caplog, asynchronous):
    with checkpointer(save=str(tmp_path), async_save=asynchronous) as writer:
        writer.save(3, TRAINER, {"own.bin": b"a rank's own"})
        writer.finish()
    assert (tmp_path / NAME / "own.bin").read_bytes() == b"a rank's own"
    assert "corrupted" not in caplog.text
    with checkpointer(seed=2, load=str(tmp_path)) as reader:
        assert reader.load(tmp_path) == TRAINER


@pytest.mark.parametrize("flag", ["finetune", "no_load_optim", "no_load_rng"])
def test_each_part_can_be_left_out(saved, flag):
    root, state, drawn = saved
    with checkpointer(seed=2, load=str(root), **SAME, **{flag: True}) as reader:
        fresh = state_of(reader.engine)
        trainer = reader.load(root)
        assert trainer == (None if flag == "finetune" else TRAINER)
        names = len(weights(reader.engine))
        assert all(map(torch.equal, state_of(reader.engine)[:names], state[:names]))
        if flag != "no_load_rng":
            assert not any(part.optimizer.state for part in reader.engine.optimizer.chained_optimizers)
            mains = state_of(reader.engine)[names:]
            assert not any(map(torch.equal, mains, fresh[names:]))
            loaded = torch.cat([p.detach().flatten().float() for p in reader.engine.models[0].parameters()])
            both = [values.square().sum().item() for values in (torch.cat(mains), loaded)]
            assert both[0] == pytest.approx(both[1], rel=1e-5)
        assert torch.equal(torch.rand(5), drawn) == (flag == "no_load_optim")


def test_nothing_to_load_yet_is_a_fresh_start_only_where_the_run_saves(tmp_path):
    here = str(tmp_path / "run")
    with checkpointer(load=here, save=here) as reader:
        assert reader.load(here) is None
    with (
        checkpointer(load=here, save=str(tmp_path / "other")) as reader,
        pytest.raises(CheckpointError) as caught,
    ):
        reader.load(here)
    one_line(caught, f"--load {here}: no such folder", "name one that a run saved to")


def test_a_killed_save_leaves_the_previous_checkpoint_loadable(root, saved):
    shutil.copytree(root / NAME, root / "iter_0000006.incomplete")
    (root / "iter_0000006.incomplete" / "__0_0.distcp").write_bytes(b"half")
    with checkpointer(seed=2, load=str(root), **SAME) as reader:
        assert reader.load(root) == TRAINER
        assert all(map(torch.equal, state_of(reader.engine), saved[1]))


def test_an_asynchronous_save_is_a_snapshot_and_becomes_the_latest_when_done(tmp_path):
    root = tmp_path / "run"
    with checkpointer(save=str(root), async_save=True, keep_last_n=1) as writer:
        writer.engine.step(batch(), OBJECTIVE, 1e-2)
        state = state_of(writer.engine)
        writer.save(1, TRAINER)
        with torch.no_grad():
            for value in [*writer.engine.models[0].parameters(), *writer.engine.models[0].buffers()]:
                value.zero_()
            for part in writer.engine.optimizer.chained_optimizers:
                for group in part.param_groups:
                    for value in group["params"]:
                        value.zero_()
                        part.optimizer.state[value]["exp_avg"].zero_()
        assert not (root / "latest_checkpointed_iteration.txt").exists()
        # the next save waits for the first, and prunes it when it is durable itself
        writer.save(2, TRAINER | {"step": 2})
        assert (root / "latest_checkpointed_iteration.txt").read_text() == "1\n"
        kept = shutil.copytree(root / "iter_0000001", tmp_path / "first")
        writer.finish()
        assert (root / "latest_checkpointed_iteration.txt").read_text() == "2\n"
        assert sorted(p.name for p in root.iterdir()) == ["iter_0000002", "latest_checkpointed_iteration.txt"]
    with checkpointer(seed=2, load=str(kept)) as reader:
        assert reader.load(kept) == TRAINER
        assert all(map(torch.equal, state_of(reader.engine), state))


@pytest.mark.parametrize(
    ("name", "value"), [("vocab_size", 240), ("num_layers", 3), ("num_experts", 4), ("qk_layernorm", False)]
)
def test_a_checkpoint_of_another_model_names_the_difference(root, name, value):
    settings = {name: value, "moe_router_num_groups": 2} if name == "num_experts" else {name: value}
    theirs = getattr(config_of("v2").model, name)
    parts = f"another model: {name}={theirs} there but {value} here", "use the config that is saved beside it"
    load_fails(root, *parts, **settings)


def record_stage(folder: Path, stage: str | None) -> None:
    folder.joinpath(TRAINER_STATE).write_text(
        json.dumps(asdict(replace(TrainerState.read(folder), stage=stage)))
    )


@pytest.mark.parametrize(
    ("recorded", "said"),
    [("pretrain", "saved by stage 'pretrain'"), (CONVERTED, "converted from Hugging Face weights")],
)
def test_only_the_weights_of_another_stage_can_be_loaded(root, recorded, said):
    record_stage(root / NAME, recorded)
    rest = "cannot resume in stage 'sft'; start from its weights alone with --pretrained-checkpoint"
    load_fails(root, f"{root / NAME}: {said}", rest, stage="sft")
    with checkpointer(seed=2, stage="sft", load=str(root), finetune=True, **SAME) as reader:
        assert reader.load(root) is None
        by_finetune = weights(reader.engine)
    with checkpointer(seed=2, stage="sft", **SAME) as reader:
        reader.load_weights(root)
        assert all(map(torch.equal, weights(reader.engine).values(), by_finetune.values()))


def test_a_checkpoint_from_before_stages_were_recorded_is_resumed(root):
    path = root / NAME / TRAINER_STATE
    state = json.loads(path.read_text())
    assert state.pop("stage") == "pretrain"
    path.write_text(json.dumps(state))
    with checkpointer(seed=2, stage="sft", load=str(root), **SAME) as reader:
        assert reader.load(root) == TRAINER


def test_a_critics_weights_are_not_taken_for_a_policys(root):
    record_stage(root / NAME, folders.CRITIC)
    load_fails(root, "holds a critic, not a language model; name its policy's", finetune=True)


@pytest.mark.parametrize(
    "name",
    [".metadata", "__0_0.distcp", "common.pt", "metadata.json", "trainer_state.json", "rng.safetensors"],
)
def test_a_missing_file_is_refused(root, name):
    (root / NAME / name).unlink()
    load_fails(root, str(root / NAME / name), untouched=not name.startswith("rng"))


@pytest.mark.parametrize(
    "name", ["__0_0.distcp", "common.pt", "metadata.json", "rng.safetensors", ".metadata"]
)
@pytest.mark.parametrize("left", [0, 0.5], ids=["empty", "half"])
def test_a_cut_file_is_refused(root, name, left):
    path = root / NAME / name
    os.truncate(path, int(path.stat().st_size * left))
    load_fails(root, str(root / NAME / name), untouched=not name.startswith("rng"))


def test_bytes_that_are_no_tensor_are_refused(root):
    path = root / NAME / "__0_0.distcp"
    path.write_bytes(b"\0" * path.stat().st_size)
    load_fails(root, f"{root / NAME}: cannot be loaded (", "load an earlier checkpoint", untouched=False)


def test_a_pointer_to_a_missing_step_is_refused(root):
    (root / "latest_checkpointed_iteration.txt").write_text("8")
    load_fails(root, "names step 8, which is not there (found: 3)")


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def evil_metadata(folder: Path, mark: Path) -> None:
    """The first tensor becomes a pickled object that lies in a file of its own."""
    import torch.distributed.checkpoint.metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    buffer = io.BytesIO()
    torch.save(Evil(mark), buffer)
    (folder / "evil.distcp").write_bytes(buffer.getvalue())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for key in [k for k in metadata.state_dict_metadata if k.startswith("embedding.")]:
        metadata.state_dict_metadata[key] = dcp.BytesStorageMetadata()
        place = _StorageInfo(relative_path="evil.distcp", offset=0, length=len(buffer.getvalue()))
        metadata.storage_data[dcp.MetadataIndex(key)] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def evil_objects(folder: Path, mark: Path) -> None:
    """Every object that Megatron keeps beside the weights is replaced in its place."""
    buffer = io.BytesIO()
    torch.save(Evil(mark), buffer)
    (folder / "evil.distcp").write_bytes(buffer.getvalue())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    objects = [index for index in metadata.storage_data if "_extra_state" in index.fqn]
    assert objects
    for index in objects:
        info = metadata.storage_data[index]
        info.relative_path, info.offset, info.length = "evil.distcp", 0, len(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_tensor_that_has_become_an_object_is_refused_and_not_unpickled(root, tmp_path):
    evil_metadata(root / NAME, tmp_path / "ran")
    load_fails(root, "cannot be read safely", "is a pickled object, not a tensor")
    assert not (tmp_path / "ran").exists()


def test_a_class_changed_by_the_pickle_hides_no_object(root, tmp_path):
    """An allowed class takes another's name and fields, so that an object may stand under a tensor's key."""
    path = root / NAME / ".metadata"
    entries = pickle.loads(path.read_bytes()).state_dict_metadata
    (size,) = {entry.size for key, entry in entries.items() if key.startswith("embedding.")}
    evil_metadata(root / NAME, tmp_path / "ran")
    body = pickle.dumps(pickle.loads(path.read_bytes()), 2)[2:]
    change = pickle.dumps((None, {"__name__": "TensorStorageMetadata", "size": size}), 2)[2:-1]
    name = b"ctorch.distributed.checkpoint.metadata\nBytesStorageMetadata\n"
    path.write_bytes(b"\x80\x02" + name + change + b"b0" + body)
    load_fails(root, "cannot be read safely (it changes what it did not build)")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", ["harmless", "evil"])
def test_metadata_exchanged_after_the_check_is_not_read(root, tmp_path, saved, monkeypatch, way):
    def then_exchanged(folder: Path) -> object:
        index = check_contents(folder)
        if way == "evil":
            (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
            torch.save(Evil(tmp_path / "ran"), folder / "common.pt")
        return index

    monkeypatch.setattr(module, "check_contents", then_exchanged)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with checkpointer(seed=2, load=str(root), **SAME) as reader:
        assert reader.load(root) == TRAINER
        assert all(map(torch.equal, state_of(reader.engine), saved[1]))
    assert not (tmp_path / "ran").exists()


def archive_of(item: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(item, buffer)
    return buffer.getvalue()


def zip_of(pickled: bytes, method: int = zipfile.ZIP_STORED, more: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", b"\0" * 100_000)
        for number in range(more):
            archive.writestr(f"archive/{number:0200}", b"")
    return buffer.getvalue()


def tensor_pickle(storage: bytes = b"FloatStorage", offset: object = 0, shape: object = (4,)) -> bytes:
    key = [value_of(item) for item in ("storage", "0", "cpu", 4)]
    pid = b"(" + key[0] + b"ctorch\n" + storage + b"\n" + b"".join(key[1:]) + b"tQ"
    rest = b"".join(value_of(item) for item in (offset, shape, (1,), False))
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + rest + b"ccollections\nOrderedDict\n)RtR."


def value_of(item: object) -> bytes:
    return pickle.dumps(item, 2)[2:-1]


CHUNKS = {
    "an object": lambda mark: archive_of(Evil(mark)),
    "a list of tensors": lambda mark: archive_of([torch.zeros(4)]),
    "a tensor of another shape": lambda mark: archive_of(torch.zeros(3)),
    "a tensor of another dtype": lambda mark: archive_of(torch.zeros(4, dtype=torch.float16)),
    "a view of a smaller storage": lambda mark: archive_of(torch.zeros(1).expand(10_000)),
    "an evil pickle in a zip": lambda mark: zip_of(pickle.dumps(Evil(mark))),
    "a compressed archive": lambda mark: zip_of(tensor_pickle(), zipfile.ZIP_DEFLATED),
    "an endless directory": lambda mark: zip_of(tensor_pickle(), more=5000),
    "an offset outside": lambda mark: zip_of(tensor_pickle(offset=1 << 40)),
    "a negative offset": lambda mark: zip_of(tensor_pickle(offset=-4)),
    "an unknown storage": lambda mark: zip_of(tensor_pickle(storage=b"load")),
    "a shape of 2**62": lambda mark: zip_of(tensor_pickle(shape=(1 << 62,))),
    "nothing": lambda mark: b"",
    "zeros": lambda mark: b"\0" * 100_000,
}


@pytest.mark.parametrize("way", CHUNKS)
def test_a_chunk_that_is_no_tensor_of_its_shape_is_refused_and_nothing_runs(root, tmp_path, monkeypatch, way):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, data = root / NAME, CHUNKS[way](tmp_path / "ran")
    (folder / "evil.distcp").write_bytes(data + b"\0" * (200_000 - len(data)) if way == "zeros" else data)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith("embedding."):
            info.relative_path, info.offset, info.length = "evil.distcp", 0, max(len(data), 1)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    load_fails(root, str(folder), untouched=False)
    assert not (tmp_path / "ran").exists()


def test_objects_beside_the_weights_are_never_unpickled(root, tmp_path, saved):
    evil_objects(root / NAME, tmp_path / "ran")
    with checkpointer(seed=2, load=str(root), **SAME) as reader:
        assert reader.load(root) == TRAINER
        assert all(map(torch.equal, state_of(reader.engine), saved[1]))
    assert not (tmp_path / "ran").exists()


def test_a_file_in_the_folders_place_cannot_be_saved_to(tmp_path):
    (tmp_path / "run").write_text("a file")
    with checkpointer(save=str(tmp_path / "run")) as writer, pytest.raises(CheckpointError) as caught:
        writer.save(1, TRAINER)
    one_line(caught, f"--save {tmp_path / 'run'}", "name a folder that can be written")
    assert (tmp_path / "run").read_text() == "a file"


def test_a_peer_that_is_gone_during_a_save_or_a_load_is_no_fault_of_the_disk(root, tmp_path, monkeypatch):
    def lose(*_: object) -> None:
        raise RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
        )

    monkeypatch.setattr(Checkpointer, "_write", lose)
    with (
        checkpointer(save=str(tmp_path / "w")) as writer,
        pytest.raises(RuntimeError, match="closed by peer"),
    ):
        writer.save(1, TRAINER)
    monkeypatch.setattr("megatron_ring.checkpoint.checkpointer.load_sharded", lose)
    with checkpointer(load=str(root), **SAME) as reader, pytest.raises(RuntimeError, match="closed by peer"):
        reader.load(root)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A real file system of that many megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(megabytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:
        # lazily: a writer process that has just failed may still hold a file
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_is_seen_before_anything_is_written(small_disk):
    disk = small_disk(2)
    with checkpointer(save=str(disk / "run")) as writer, pytest.raises(CheckpointError) as caught:
        writer.save(1, TRAINER)
    one_line(caught, f"--save {disk / 'run'}", "GB free but the checkpoint of step 1 needs", "free space")
    assert list((disk / "run").iterdir()) == []


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_disk_that_fills_up_during_a_save_keeps_the_previous_checkpoint(
    small_disk, monkeypatch, async_save
):
    disk = small_disk(12)
    with checkpointer(save=str(disk / "run"), async_save=async_save) as writer:
        writer.save(1, TRAINER)
        writer.finish()
        with open(disk / "other", "wb") as other:
            other.write(b"0" * (shutil.disk_usage(disk).free - 1_000_000))
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: _Plenty)
        with pytest.raises(CheckpointError) as caught:
            writer.save(2, TRAINER)
            writer.finish()
        one_line(caught, f"--save {disk / 'run'}", "the previous checkpoint stays")
        assert (disk / "run" / "latest_checkpointed_iteration.txt").read_text() == "1\n"
        names = sorted(path.name for path in (disk / "run").iterdir())
        assert names == ["iter_0000001", "latest_checkpointed_iteration.txt"], "nothing half-written is left"
        assert writer.load(disk / "run" / "iter_0000001") == TRAINER


class _Plenty:
    free = 10**15
