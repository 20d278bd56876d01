"""The folders that the conversion tests read."""

from pathlib import Path

import pytest

from tests.helpers.checkpoint.convert_cases import ODD, write_hf


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Hugging Face folder per model; tests that damage one copy it first."""
    root = tmp_path_factory.mktemp("hf")
    return {name: write_hf(model, root / name) for name, model in ODD.items()}
