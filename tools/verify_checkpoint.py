"""``ring verify`` where nothing is installed: ``python tools/verify_checkpoint.py --help``."""

from megatron_ring.launch.commands.verify import main
from megatron_ring.launch.entry import run_entry

if __name__ == "__main__":
    run_entry(main)
