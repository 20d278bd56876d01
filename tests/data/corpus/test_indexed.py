import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data.corpus.indexed import manifest_path, open_indexed
from megatron_ring.data.corpus.writer import token_dtype, write_corpus
from megatron_ring.errors import DataError

DOCUMENTS = [[5, 6, 1], [7, 1], [8, 9, 10, 1]]
HEADER_BYTES = 34


def documents_of(prefix: str) -> list[list[int]]:
    corpus = open_indexed(prefix)
    return [
        corpus.tokens[begin:end].tolist()
        for begin, end in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    ]


def test_what_is_written_is_read(write_documents: Callable[..., str]):
    prefix = write_documents(DOCUMENTS, vocab="tiny")
    assert documents_of(prefix) == DOCUMENTS
    corpus = open_indexed(prefix)
    assert (corpus.num_documents, corpus.num_tokens, corpus.tokens.dtype) == (3, 9, np.uint16)
    assert corpus.manifest == {"vocab": "tiny", "num_documents": 3, "num_tokens": 9}


def test_megatron_reads_what_is_written(write_documents: Callable[..., str]):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(write_documents(DOCUMENTS))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("vocab_size", [1000, 126464])
def test_the_bytes_are_those_of_megatrons_builder(tmp_path: Path, vocab_size: int):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    with write_corpus(tmp_path / "ours", vocab_size=vocab_size, manifest={}) as writer:
        for document in DOCUMENTS:
            writer.add(np.array(document))
            builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


@pytest.mark.parametrize("document", [[], [70000], [-1]])
def test_a_document_that_does_not_fit_is_a_bug(tmp_path: Path, document: list[int]):
    with (
        pytest.raises(ValueError, match="token ids of type uint16"),
        write_corpus(tmp_path / "c", vocab_size=1000, manifest={}) as writer,
    ):
        writer.add(np.array(document, dtype=np.int64))
    assert list(tmp_path.iterdir()) == []


def test_documents_of_several_sequences_are_read_as_megatron_means_them(tmp_path: Path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.int32)
    for sentences in ([[1, 2], [3]], [[4, 5, 6]]):
        for sentence in sentences:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "s.idx"))
    assert documents_of(str(tmp_path / "s")) == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32), (126464, np.int32)])
def test_token_width_is_megatrons(vocab_size: int, dtype: type):
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == dtype == DType.optimal_dtype(vocab_size)


def test_a_corpus_cut_short_anywhere_is_refused(write_documents: Callable[..., str]):
    prefix = write_documents(DOCUMENTS)
    for ending in (".idx", ".bin"):
        path = Path(prefix + ending)
        content = path.read_bytes()
        for size in range(len(content)):
            path.write_bytes(content[:size])
            with pytest.raises(DataError, match=r"truncated|describes|must begin with MMIDIDX"):
                open_indexed(prefix)
        path.write_bytes(content)
    assert documents_of(prefix) == DOCUMENTS


def test_a_bin_of_another_corpus_is_refused(write_documents: Callable[..., str]):
    prefix, other = write_documents(DOCUMENTS), write_documents([[1] * 50], name="other")
    Path(other + ".bin").replace(prefix + ".bin")
    with pytest.raises(
        DataError, match=r"corpus\.bin has 100 bytes, but corpus\.idx describes 18 \(9 tokens"
    ):
        open_indexed(prefix)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        pytest.param(0, b"XMIDIDX", r"corpus\.idx is not a Megatron index", id="magic"),
        pytest.param(9, struct.pack("<Q", 2), "index version 2, only version 1 is known", id="version"),
        pytest.param(17, b"\x07", "tokens as float32 numbers; token ids must be integers", id="float tokens"),
        pytest.param(17, b"\x63", r"an unknown type \(code 99\)", id="unknown type"),
        pytest.param(17, b"\x04", "lengths and byte offsets contradict", id="other type"),
        pytest.param(18, struct.pack("<Q", 2**61), "but its header describes", id="sequence count"),
        pytest.param(HEADER_BYTES, struct.pack("<i", 4), "lengths and byte offsets contradict", id="length"),
        pytest.param(HEADER_BYTES, struct.pack("<i", -3), "contradict", id="negative length"),
        pytest.param(HEADER_BYTES + 12, struct.pack("<q", 2), "contradict", id="pointer"),
        pytest.param(HEADER_BYTES + 36, struct.pack("<q", 1), "document ends do not run", id="first end"),
        pytest.param(HEADER_BYTES + 44, struct.pack("<q", 3), "document ends do not run", id="ends fall"),
        pytest.param(HEADER_BYTES + 60, struct.pack("<q", 9), "document ends do not run", id="last end"),
    ],
)
def test_a_damaged_index_is_refused(
    write_documents: Callable[..., str], where: int, value: bytes, message: str
):
    prefix = write_documents(DOCUMENTS)
    path = Path(prefix + ".idx")
    content = bytearray(path.read_bytes())
    content[where : where + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_indexed(prefix)
    assert "\n" not in str(caught.value) and "preprocess_data.py" in str(caught.value)


def test_missing_files_are_named(write_documents: Callable[..., str]):
    prefix = write_documents(DOCUMENTS)
    with pytest.raises(
        DataError, match=r"nowhere\.idx does not exist; data_path=.*nowhere must be the prefix"
    ):
        open_indexed(Path(prefix).with_name("nowhere"))
    with pytest.raises(DataError, match="give the prefix without the ending"):
        open_indexed(prefix + ".bin")
    Path(prefix + ".bin").unlink()
    with pytest.raises(DataError, match=r"corpus\.bin does not exist"):
        open_indexed(prefix)


def test_a_damaged_note_is_refused(write_documents: Callable[..., str]):
    prefix = write_documents(DOCUMENTS)
    for content in ("{", json.dumps([1])):
        manifest_path(prefix).write_text(content)
        with pytest.raises(DataError, match="or delete it"):
            open_indexed(prefix)
    manifest_path(prefix).unlink()
    assert open_indexed(prefix).manifest == {}


def test_a_failed_writer_leaves_the_old_corpus(write_documents: Callable[..., str]):
    prefix = write_documents(DOCUMENTS)
    with (
        pytest.raises(DataError, match="unreadable"),
        write_corpus(prefix, vocab_size=9, manifest={}) as writer,
    ):
        writer.add(np.array([1, 2]))
        raise DataError("unreadable")
    assert documents_of(prefix) == DOCUMENTS
    assert sorted(path.name for path in Path(prefix).parent.iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.meta.json",
    ]
