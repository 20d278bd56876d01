"""``ring convert`` where nothing is installed: ``python tools/convert_checkpoint.py --help``."""

from megatron_ring.launch.commands.convert import main
from megatron_ring.launch.entry import run_entry

if __name__ == "__main__":
    run_entry(main)
