"""Every case gives what its README expects."""

from __future__ import annotations

import pytest

from tests.cases import FOLDER, areas, rows


@pytest.mark.parametrize("area", areas())
def test_every_input_gives_what_is_expected(area: str) -> None:
    found = list(rows(area))
    assert found, "no rows"
    differing = [row for row in found if row.got != row.expected]
    assert not differing, "\n".join(map(str, differing))


def test_every_case_is_run_by_an_area() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*_cases.py"))
    unused = [
        path.name for path in FOLDER.iterdir() if (path / "README.md").exists() and path.name not in sources
    ]
    assert not unused, f"no module of tests/cases mentions {unused}"
