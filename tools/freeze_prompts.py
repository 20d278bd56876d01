"""``ring prompts`` where nothing is installed: ``python tools/freeze_prompts.py --help``."""

from megatron_ring.launch.commands.prompts import main
from megatron_ring.launch.entry import run_entry

if __name__ == "__main__":
    run_entry(main)
