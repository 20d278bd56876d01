"""Runs a script several times in one process: ``python -m tests.helpers.e2e.script_worker SCRIPT FILE``.

``FILE`` is a JSON list of command lines. Torch and Megatron are imported once; each run opens a session of its own.
The first that fails ends them all, with its exit code.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    script, commands = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    for words in commands:
        sys.argv = [script, *words]
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException as end:
            if isinstance(end, SystemExit) and not end.code:
                continue
            print("failed:", *sys.argv, file=sys.stderr, flush=True)
            raise


if __name__ == "__main__":
    main()
