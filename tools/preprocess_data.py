"""``ring preprocess`` where nothing is installed: ``python tools/preprocess_data.py --help``."""

from megatron_ring.launch.commands.preprocess import main
from megatron_ring.launch.entry import run_entry

if __name__ == "__main__":
    run_entry(main)
