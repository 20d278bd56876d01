from pathlib import Path

import pytest

from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.errors import DataError


def test_it_is_megabytes_of_the_standard_librarys_modules():
    documents = builtin_documents()
    assert sum(len(text.encode()) for text in documents) > 5e6
    assert any("class TextWrapper" in text for text in documents)
    # what this machine's Python was built with
    assert not any(text.startswith("# system configuration generated") for text in documents)


def test_a_smaller_one_is_the_beginning_of_a_larger_one():
    small, large = builtin_documents(0.5), builtin_documents(1.0)
    assert large[: len(small)] == small and len(large) > len(small)
    size = sum(len(text.encode()) for text in small)
    assert size >= 0.5e6 > size - len(small[-1].encode())


def test_the_order_mixes_folders_and_is_the_same_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    orders = []
    for root in (tmp_path / "usr", tmp_path / "home" / "python"):
        for i in range(30):
            path = root / f"package{i // 10}" / f"module{i}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {i // 10}")
        monkeypatch.setattr("sysconfig.get_path", lambda _, root=root: str(root))
        orders.append(builtin_documents())
    assert orders[0] == orders[1]
    neighbours = zip(orders[0], orders[0][1:], strict=False)
    assert sum(here != there for here, there in neighbours) > 10


def test_no_megabytes_are_refused():
    with pytest.raises(DataError, match="max_mb=0 of the built-in corpus must be positive"):
        builtin_documents(0)


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="no Python sources under"):
        builtin_documents(1)
