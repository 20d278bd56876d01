"""Where the kernel tests run."""

import numpy as np
import pytest

from tests.helpers.kernels import backends

triton = pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "runs"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.6", False), ("3.7.1", "2.4.6", True), ("3.9.0", "2.5.2", True)],
)
def test_an_interpreter_that_numpy_breaks_is_skipped_aloud(
    triton_version: str, numpy_version: str, runs: bool, monkeypatch: pytest.MonkeyPatch
):
    """Triton's own fault: it makes an int of an array with one element, which numpy 2.4 refuses."""
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(np, "__version__", numpy_version)
    reason = backends.why_not_interpreted()
    assert (reason is None) == runs
    if reason is not None:
        assert "3.6.0 needs numpy below 2.4, and this is 2.4.6" in reason
        with pytest.raises(pytest.skip.Exception, match=r"needs numpy below 2\.4"):
            backends.run_in_the_interpreter("no file")
