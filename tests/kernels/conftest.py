"""The ``backend`` fixture: see backends.py."""

from collections.abc import Iterator

import pytest
import torch

from megatron_ring.kernels import dispatch
from tests.helpers.kernels.backends import DEVICE, INTERPRETER_SECONDS, backends, interpreted_files
from tools.gpu.guard import guarded_outputs

_Generator = torch.Generator


class _GeneratorsOnDevice(type):
    """Tests make ``torch.Generator()``; values are drawn on the device, and want theirs there."""

    def __call__(cls, device: object = None) -> torch.Generator:
        return _Generator(device or DEVICE)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _Generator)


class _OnDevice(metaclass=_GeneratorsOnDevice):
    pass


if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
    torch.Generator = _OnDevice


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if DEVICE != "cpu":
        others = [item for item in items if "backend" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Those that are left after -k and -m."""
    for item in session.items:
        if item.name == "test_triton_in_the_interpreter":
            interpreted_files.add(str(item.path))
            item.add_marker(pytest.mark.timeout(INTERPRETER_SECONDS + 100))


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
