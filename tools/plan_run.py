"""``ring plan`` where nothing is installed: ``python tools/plan_run.py --help``."""

from megatron_ring.launch.commands.plan import main
from megatron_ring.launch.entry import run_entry

if __name__ == "__main__":
    run_entry(main)
