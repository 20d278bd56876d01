import pytest

from megatron_ring.data.builtin import builtin_documents
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


def test_neighbours_are_not_neighbours_in_the_alphabet():
    first_lines = [text[:40] for text in builtin_documents(2)]
    assert first_lines != sorted(first_lines)


def test_no_megabytes_are_refused():
    with pytest.raises(DataError, match="max_mb=0 of the built-in corpus must be positive"):
        builtin_documents(0)


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="no Python sources under"):
        builtin_documents(1)
