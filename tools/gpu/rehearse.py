#!/usr/bin/env python3
"""Run one part of the check on a pretended GPU: its code takes the GPU's path, and what a GPU would refuse
raises.

    python tools/gpu/rehearse.py right.py OUT --small
    python tools/gpu/rehearse.py fast.py OUT --tiny      its times are made up

Numbers are the reference's (see pretend.py): what the kernels compute is not tested here.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tools.gpu.pretend import pretending

PARTS = ("right.py", "fast.py")


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in PARTS:
        sys.exit(f"error: name one of {', '.join(PARTS)} and its words, OUT first")
    sys.argv = sys.argv[1:]
    with pretending():
        runpy.run_path(str(Path(__file__).with_name(sys.argv[0])), run_name="__main__")


if __name__ == "__main__":
    main()
