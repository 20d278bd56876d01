"""``ring report`` where nothing is installed: ``python tools/report.py --help``."""

from megatron_ring.launch.commands.report import main
from megatron_ring.launch.entry import run_entry

if __name__ == "__main__":
    run_entry(main)
