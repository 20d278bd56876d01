"""What a process that a test starts finds on its PYTHONPATH."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_path(root: Path = ROOT) -> str:
    """``root``, and behind it what this process was given: where there is no registry, that is where packages are."""
    return os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH", "")])])
