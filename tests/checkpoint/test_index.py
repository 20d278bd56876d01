"""``.metadata`` from outside: whatever it asks for, nothing runs, nothing grows, and one line says why not."""

from __future__ import annotations

import gc
import io
import os
import pathlib
import pickle
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from socket import AddressFamily

import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_ring.checkpoint.index import read_index
from megatron_ring.checkpoint.pickles import Built, Pairs, PickleError, read_pickle
from megatron_ring.errors import CheckpointError

DCP = "torch.distributed.checkpoint.metadata"


def one_line(caught: pytest.ExceptionInfo[CheckpointError], *parts: str) -> None:
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    for part in parts:
        assert part in line, line


class Evil:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: object, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def torch_bytes(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Evil(pathlib.Path.touch, mark), buffer)
    return buffer.getvalue()


def words(*texts: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in texts)


def value(item: object) -> bytes:
    """The opcodes that push ``item``."""
    return pickle.dumps(item, 2)[2:-1]


def named(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls what ``module`` holds under the dotted ``name``."""
    return b"\x80\x04" + words(module, name) + b"\x93(" + b"".join(map(value, arguments)) + b"tR."


def runs(mark: Path) -> dict[str, bytes]:
    """Pickles that do run, read by Python's own unpickler."""
    command = f"touch {mark}"
    system = words("os", "system")
    return {
        "os.system": pickle.dumps(Evil(os.system, command)),
        "eval": pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')")),
        # ways round a check of the module's name alone
        "an import of a trusted module": named("torch", "os.system", command),
        "an import of a trusted standard module": named("pathlib", "os.system", command),
        "a reader of pickles": named("torch.storage", "_load_from_bytes", torch_bytes(mark)),
        "a runner inside a trusted module": named("torch.utils.collect_env", "run", command),
        "opcode INST": b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.",
        "opcode OBJ": b"\x80\x02(cos\nsystem\n" + value(command) + b"o.",
        # mmaitre314/picklescan#14: the memo holds what a reader of opcodes does not expect
        "memo by number": b"\x80\x04"
        + system[:4]
        + b"q\x00"
        + system[4:]
        + b"q\x0100h\x00h\x01\x93"
        + value(command)
        + b"\x85R.",
        # protectai/modelscan#85: attributes set on an allowed class, then named
        "names kept in an allowed class": b"\x80\x04cpathlib\nPurePath\nN}"
        + value("a")
        + value("os")
        + b"s\x86b0cpathlib\nPurePath.a\n"
        + value("system")
        + b"\x93"
        + value(command)
        + b"\x85R.",
        "a class made on the spot": named(
            "builtins", "eval", f"type('X', (), {{'__del__': lambda s: open({str(mark)!r}, 'w')}})()"
        ),
    }


@pytest.mark.parametrize("way", runs(Path("x")))
def test_metadata_that_would_run_code_is_refused_and_nothing_runs(tmp_path, way):
    mark = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(runs(mark)[way])
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    gc.collect()
    one_line(caught, ".metadata", "cannot be read safely", "load a checkpoint that Megatron wrote")
    assert not mark.exists()


def test_the_evil_pickles_are_evil(tmp_path):
    """Read without a guard each of them does what it came for, but for ways that need torch's own import."""
    for way, data in runs(tmp_path / "ran").items():
        (tmp_path / "ran").unlink(missing_ok=True)
        __import__("torch.utils.collect_env")
        pickle.loads(data)
        gc.collect()
        assert (tmp_path / "ran").exists(), way
    del pathlib.PurePath.a  # what one of them left behind


def whole() -> dcp.Metadata:
    """One tensor in two chunks, and an object where Megatron puts one."""
    chunks = [dcp.ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((2, 3))) for at in (0, 2)]
    properties = dcp.TensorProperties(dtype=torch.bfloat16)
    places = {
        dcp.MetadataIndex("w", torch.Size((at, 0)), n): _StorageInfo("__0_0.distcp", 100 * n, 100)
        for n, at in enumerate((0, 2))
    }
    places[dcp.MetadataIndex("a._extra_state/shard_0_1")] = _StorageInfo("__0_0.distcp", 200, 10)
    entries = {
        "w": dcp.TensorStorageMetadata(properties, torch.Size((4, 3)), chunks),
        "a._extra_state/shard_0_1": dcp.BytesStorageMetadata(),
    }
    return dcp.Metadata(entries, storage_data=places, storage_meta=dcp.StorageMeta(checkpoint_id=Path("x")))


def write(folder: Path, data: bytes) -> None:
    (folder / ".metadata").write_bytes(data)
    (folder / "__0_0.distcp").write_bytes(b"\0" * 210)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_wrote_is_read(tmp_path, protocol):
    write(tmp_path, pickle.dumps(whole(), protocol))
    index = read_index(tmp_path)
    tensor = index.tensors["w"]
    assert (tensor.dtype, tensor.shape) == ("bfloat16", (4, 3))
    assert [(c.offset, c.shape, c.file, c.start, c.length) for c in tensor.chunks] == [
        ((0, 0), (2, 3), "__0_0.distcp", 0, 100),
        ((2, 0), (2, 3), "__0_0.distcp", 100, 100),
    ]
    assert index.objects == ("a._extra_state/shard_0_1",) and index.files == {"__0_0.distcp": 210}


def edited(change: Callable[[dcp.Metadata], object]) -> bytes:
    metadata = whole()
    change(metadata)
    return pickle.dumps(metadata)


def before(opcodes: bytes) -> bytes:
    """The honest pickle, with ``opcodes`` run first."""
    return b"\x80\x02" + opcodes + pickle.dumps(whole(), 2)[2:]


def place(m: dcp.Metadata, **fields: object) -> None:
    for name, item in fields.items():
        setattr(next(iter(m.storage_data.values())), name, item)


def entry(m: dcp.Metadata, **fields: object) -> None:
    for name, item in fields.items():
        setattr(m.state_dict_metadata["w"], name, item)


BYTES = f"c{DCP}\nBytesStorageMetadata\n".encode()
RENAME = b"N}" + value("__name__") + value("TensorStorageMetadata") + b"s\x86b0"
HUGE = struct.pack("<Q", 1 << 62)
HARMS: dict[str, tuple[bytes, str]] = {
    # protocol 2 has no way to write these, so what is honest follows
    "an allowed class renamed": (before(BYTES + RENAME), "changes what it did not build"),
    "an attribute of an allowed class": (
        before(BYTES + b"}" + value("__setstate__") + BYTES + b"sb0"),
        "changes what it did not build",
    ),
    "a function as an attribute": (
        before(b"ctorch.serialization\n_get_layout\nN}" + value("__code__") + b"Ns\x86b0"),
        "changes what it did not build",
    ),
    "built twice": (before(BYTES + b")\x81}b}b0"), "changes what it did not build"),
    "a call of what was called": (before(b"ctorch\nSize\n)R)R0"), "calls what is no name"),
    "a call with no arguments in a row": (before(b"ctorch\nSize\nNR0"), "calls what is no name"),
    "an item of a set": (
        before(b"cbuiltins\nset\n)R" + value("x") + b"Ns0"),
        "sets items of what is no dict",
    ),
    "appended to an object": (before(BYTES + b")\x81Na0"), "appends to what is no list"),
    "getattr": (
        before(b"cbuiltins\ngetattr\n(cpathlib\nPath\nX\x04\x00\x00\x00hometR0"),
        "it names builtins.getattr",
    ),
    "a dotted way out": (before(b"ctorch\nSize.__init__.__globals__\n0"), "it names torch.Size"),
    "a name that is no text": (b"\x80\x04NN\x93.", "names something that is no name"),
    "opcode NEWOBJ_EX": (b"\x80\x04ctorch\nSize\n)}\x92.", "opcode b'\\x92'"),
    "opcode EXT1": (b"\x80\x02\x82\x01.", "opcode b'\\x82'"),
    "opcode PERSID": (b"\x80\x02Px\n.", "opcode b'P'"),
    "opcode BINPERSID": (b"\x80\x02NQ.", "refers to something outside itself"),
    "opcode NEXT_BUFFER": (b"\x80\x05\x97.", "opcode b'\\x97'"),
    "opcode BYTEARRAY8": (b"\x80\x05\x96" + HUGE + b".", "opcode b'\\x96'"),
    "a string of four exabytes": (b"\x80\x04\x8d" + HUGE + b"x.", "ends early"),
    "bytes of four exabytes": (b"\x80\x04\x8e" + HUGE + b"x.", "ends early"),
    "a frame of four exabytes": (b"\x80\x04\x95" + HUGE + b"N.", "ends early"),
    "an integer of a gigabyte": (b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"1.", "an integer of"),
    "an integer of a negative length": (b"\x80\x02\x8b" + struct.pack("<i", -1) + b"1.", "ends early"),
    # python/cpython#115952: the built-in reader makes room for the number that is claimed
    "a memo of 2**32 places": (b"\x80\x02Nr\xff\xff\xff\xff.", "no Metadata"),
    "nothing at that place": (b"\x80\x02h\x07.", "is damaged"),
    "nothing to take": (b"\x80\x020.", "is damaged"),
    "no mark": (b"\x80\x02NNt.", "is damaged"),
    "nested 100,000 deep": (b"\x80\x02" + b")" + b"\x85" * 100_000 + b".", "no Metadata"),
    "lists nested 100,000 deep": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "no Metadata"),
    # tracel-ai/burn#4965: each of the doublings is two bytes long
    "2**1000 elements": (b"\x80\x02N" + b"q\x00h\x00\x86" * 1000 + b".", "no Metadata"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "no Metadata"),
    "more behind its end": (pickle.dumps(whole()) + b"N.", "is damaged"),
    "empty": (b"", "is damaged"),
    "text": (b"not a pickle", "opcode b'n'"),
    "cut": (pickle.dumps(whole())[:-9], "it ends early"),
    "not a checkpoint": (pickle.dumps({"a": 1}), "no Metadata"),
    "a string that is not UTF-8": (b"\x80\x02X\x01\0\0\0\xff.", "not UTF-8"),
    "another file's": (edited(lambda m: place(m, relative_path="../evil.distcp")), "no file of the folder"),
    "a file by its whole path": (
        edited(lambda m: place(m, relative_path="/dev/zero")),
        "no file of the folder",
    ),
    "a file without a name": (edited(lambda m: place(m, relative_path="")), "no file of the folder"),
    "bytes before the start": (edited(lambda m: place(m, offset=-1)), "at no place of"),
    "true for a length": (edited(lambda m: place(m, length=True)), "at no place of"),
    "a transformation": (edited(lambda m: place(m, transform_descriptors=["zstd"])), "was transformed"),
    "a shape of 2**62": (
        edited(lambda m: entry(m, size=torch.Size((1 << 62, 3)))),
        "the chunks of 'w' are not the whole of it",
    ),
    "a chunk of 2**62": (
        edited(
            lambda m: entry(
                m,
                size=torch.Size((1 << 62, 1)),
                chunks=[dcp.ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((1 << 62, 1)))],
            )
        ),
        "too few bytes for its shape",
    ),
    "a negative shape": (edited(lambda m: entry(m, size=(-4, 3))), "a size that is none"),
    "a shape with true in it": (edited(lambda m: entry(m, size=(4, True))), "a size that is none"),
    "a thousand dimensions": (edited(lambda m: entry(m, size=(1,) * 1000)), "a size that is none"),
    "a chunk outside": (
        edited(lambda m: entry(m, size=torch.Size((3, 3)))),
        "a chunk of 'w' lies outside it",
    ),
    "a hole": (edited(lambda m: m.state_dict_metadata["w"].chunks.pop()), "are not the whole of it"),
    "two chunks over one another, and a hole": (
        edited(
            lambda m: (
                m.state_dict_metadata["w"].chunks.__setitem__(
                    1, dcp.ChunkStorageMetadata(torch.Size((1, 0)), torch.Size((2, 3)))
                ),
                m.storage_data.update(
                    {dcp.MetadataIndex("w", torch.Size((1, 0))): _StorageInfo("__0_0.distcp", 100, 100)}
                ),
            )
        ),
        "are not the whole of it",
    ),
    "a chunk nowhere": (
        edited(lambda m: m.storage_data.pop(dcp.MetadataIndex("w", torch.Size((2, 0))))),
        "chunk [2, 0] of 'w' is nowhere",
    ),
    "no chunks": (edited(lambda m: entry(m, chunks={})), "no list of chunks"),
    "no properties": (edited(lambda m: entry(m, properties=None)), "lacks a dict"),
    "no places": (edited(lambda m: setattr(m, "storage_data", None)), "lacks a dict"),
    "a key that is no string": (
        edited(lambda m: m.state_dict_metadata.update({3: dcp.BytesStorageMetadata()})),
        "a key is 3, not a string",
    ),
    "an entry that is no entry": (
        edited(lambda m: m.state_dict_metadata.update(w=torch.Size((1,)))),
        "no TensorStorageMetadata where one belongs",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_harmful_metadata_is_one_line_and_costs_nothing(tmp_path, harm):
    data, reason = HARMS[harm]
    write(tmp_path, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    one_line(caught, ".metadata: cannot be read safely", reason)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000, "kilobytes"
    assert dcp.BytesStorageMetadata.__name__ == "BytesStorageMetadata"


def test_a_key_that_is_a_tensor_and_an_object_is_refused(tmp_path):
    """No dict can say it, a pickle of one can."""
    honest = pickle.dumps(whole(), 2)
    twice = honest.replace(b"a._extra_state/shard_0_1", b"w" + b"." * 23).replace(
        b"X\x01\0\0\0w", b"X\x18\0\0\0w" + b"." * 23
    )
    write(tmp_path, twice)
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    one_line(caught, "is there twice")


def test_a_metadata_file_of_any_size_is_refused_by_its_size(tmp_path):
    with open(tmp_path / ".metadata", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    one_line(caught, "bytes, more than")


def test_a_pickle_of_too_many_opcodes_is_refused():
    with pytest.raises(PickleError, match="more than 1,000 opcodes"):
        read_pickle(b"\x80\x02" + b"N0" * 1000 + b"N.", {}, max_opcodes=1000)


class Member:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an enum."""

    def __init__(self, enum: object, name: object):
        self.call = (getattr, (enum, name))

    def __reduce__(self):
        return self.call


def test_members_of_known_enums_may_be_written_as_getattr_and_nothing_else():
    allowed, enums = {"socket": "AddressFamily", "pathlib": "Path"}, ["socket.AddressFamily"]
    for protocol in (2, 3, 4, 5):
        data = pickle.dumps([Member(AddressFamily, "AF_INET")] * 2, protocol, fix_imports=False)
        one, two = read_pickle(data, allowed, enums=enums)
        assert isinstance(one, Built) and str(one.of) == "socket.AddressFamily" and one.args == ("AF_INET",)
        assert two is one
        with pytest.raises(PickleError, match=r"it names builtins\.getattr"):
            read_pickle(data, allowed)
    for enum, name in ((Path, "home"), ("x", "upper"), (AddressFamily, b"AF_INET")):
        with pytest.raises(PickleError, match=r"it names (builtins\.getattr|_codecs\.encode)"):
            read_pickle(pickle.dumps(Member(enum, name), 4), allowed, enums=enums)


def test_a_pickle_becomes_plain_values():
    read = read_pickle(pickle.dumps([1, -(1 << 70), 2.5, "é", b"x", None, True, (3, [4]), {"k": {5}}]), {})
    assert read[:8] == [1, -(1 << 70), 2.5, "é", b"x", None, True, (3, [4])]
    assert isinstance(read[8], Pairs) and read[8].pairs == [("k", [5])]
    call = read_pickle(pickle.dumps(torch.Size((2, 3))), {"torch": "Size"})
    assert isinstance(call, Built) and str(call.of) == "torch.Size" and call.args == ((2, 3),)


def test_missing_metadata_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    one_line(caught, ".metadata: No such file or directory", "load a complete checkpoint folder")


@pytest.mark.parametrize(
    ("size", "words"), [(None, "missing although"), (209, "has 209 of at least 210 bytes")]
)
def test_a_file_that_is_missing_or_cut_is_named(tmp_path, size, words):
    write(tmp_path, pickle.dumps(whole()))
    (tmp_path / "__0_0.distcp").unlink()
    if size:
        (tmp_path / "__0_0.distcp").write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    one_line(caught, "__0_0.distcp", words)
