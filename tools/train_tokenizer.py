"""``ring tokenizer`` where nothing is installed: ``python tools/train_tokenizer.py --help``."""

from megatron_ring.launch.commands.tokenizer import main
from megatron_ring.launch.entry import run_entry

if __name__ == "__main__":
    run_entry(main)
