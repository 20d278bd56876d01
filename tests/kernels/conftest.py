"""The ``backend`` fixture: see backends.py."""

from collections.abc import Iterator

import pytest

from megatron_ring.kernels import dispatch
from tests.kernels.backends import backends, guarded_outputs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends(), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one backend for the test; on Triton every output is guarded."""
    with dispatch.force(request.param):
        if request.param != "triton":
            yield request.param
            return
        with guarded_outputs():
            yield request.param
