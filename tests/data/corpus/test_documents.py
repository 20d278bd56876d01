import gzip
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ring.data.corpus import documents
from megatron_ring.data.corpus.documents import read_records, record_text
from megatron_ring.errors import DataError


def texts(*inputs: Path, keys: Sequence[str] = ("text",)) -> list[str | None]:
    return [record_text(record, keys) for record in read_records(inputs)]


def test_jsonl_lines_and_plain_files_are_documents(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one", "title": "1"}\n\n{"text": "two\\nlines", "title": "2"}\n'
    )
    (tmp_path / "b.txt").write_text("three\nfour\n")
    assert texts(tmp_path / "a.jsonl", tmp_path / "b.txt") == ["one", "two\nlines", "three\nfour\n"]
    assert texts(tmp_path / "a.jsonl", keys=["title", "text"]) == ["1\none", "2\ntwo\nlines"]


def test_folders_are_read_in_order_without_hidden_and_binary_files(tmp_path: Path):
    for name, content in [
        ("z.txt", b"last"),
        ("sub/a.py", b"second"),
        ("b.md", "fi\u00e9rst".encode()),
        (".hidden", b"no"),
        (".git/config", b"no"),
        ("x.png", b"\x89PNG\xff"),
        ("y.bin", b"nul \x00"),
        ("package.json", b'{\n "a": 1\n}'),
    ]:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert texts(tmp_path / "in") == [
        "fi\u00e9rst",
        '{\n "a": 1\n}',
        "second",
        None,
        None,
        "last",
    ]


def test_a_named_json_file_is_jsonl(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts(tmp_path / "a.json") == ["one", "two"]


def test_gzip_and_byte_order_marks_are_seen_through(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    assert texts(tmp_path / "a.jsonl.gz", tmp_path / "b.txt") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 is a JSON list; JSONL holds one object per line"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: key 'text' is missing, .*; found keys: body"),
        ("a.jsonl", b'{"text": 5}\n', "key 'text' is a int, it must be a string"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1 is not UTF-8 \(byte 10\); convert it"),
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 \(byte 3\); convert it"),
        ("a.txt.gz", b"not gzip", r"cannot read .*a\.txt\.gz: Not a gzipped file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_inputs_that_are_not_there_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"input .*nowhere does not exist"):
        texts(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"input folder .* contains no files"):
        texts(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_unicode_with_its_mark_is_read_as_what_it_is(tmp_path: Path, encoding: str, packed: bool):
    mark = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}.get(encoding, "")
    text = '{"text": "\u0a0aone"}\n\n{"text": "\u00fc \U0001f600"}\n'
    for name, content in (("a.jsonl", text), ("b.txt", "\u0a0a two\n")):
        data = (mark + content).encode(encoding)
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    paths = sorted(tmp_path.iterdir())
    records = list(read_records(paths))
    assert [record_text(record, ["text"]) for record in records] == [
        "\u0a0aone",
        "\u00fc \U0001f600",
        "\u0a0a two\n",
    ]
    assert [record.origin.rpartition(":")[2] for record in records[:2]] == ["1", "3"]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n'.encode("utf-16-le"),
            "a.jsonl is UTF-16 without a byte order mark; convert it to UTF-8",
        ),
        (
            "a.jsonl",
            '{"text": "x"}\n'.encode("utf-16-be"),
            "a.jsonl is UTF-16 without a byte order mark; convert it to UTF-8",
        ),
        (
            "a.txt",
            "one two".encode("utf-16-le"),
            "a.txt is UTF-16 without a byte order mark; convert it to UTF-8",
        ),
        ("a.jsonl", b"\xff\xfe{\x00\x00", "a.jsonl is not UTF-16, which its byte order mark declares"),
        ("a.txt", b"\xff\xfe{\x00\x00", "a.txt is not UTF-16, which its byte order mark declares"),
        ("a.jsonl", b'{"text": "\xe9"}', "a.jsonl:1 is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1 is nested too deeply, more than 64 deep"),
    ],
)
def test_what_is_no_unicode_is_one_line(tmp_path: Path, name: str, data: bytes, said: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said) as caught:
        [record_text(record, ["text"]) for record in read_records([tmp_path / name])]
    assert "\n" not in str(caught.value)


def test_a_line_or_a_packed_file_without_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(documents, "MAX_UNPACKED_BYTES", 1000)
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(("{}\n" + "[" * 5000).encode(encoding)))
        with pytest.raises(DataError, match=r"a.jsonl.gz has a line of more than"):
            list(read_records([tmp_path / "a.jsonl.gz"]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x" * 5000))
    with pytest.raises(DataError, match=r"b.txt.gz unpacks to more than"):
        list(read_records([tmp_path / "b.txt.gz"]))
    (tmp_path / "c.txt").write_bytes(b"x" * 5000)
    assert texts(tmp_path / "c.txt") == ["x" * 5000], "a plain file is as large as it lies there"


def test_an_unreadable_file_that_was_only_found_is_left_out(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00\xd8x")
    (record,) = read_records([tmp_path])
    assert record_text(record, ["text"]) is None
