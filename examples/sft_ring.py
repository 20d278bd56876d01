"""Fine-tune a Ring model on conversations: ``python examples/sft_ring.py --config examples/tiny/sft.toml``.

Every setting is a flag (``--help``); ``--dry-run`` prints the plan and stops. Several processes: torchrun or
srun.
"""

from megatron_ring.launch.entry import run_entry, start


def main() -> None:
    config = start(stage="sft")
    from megatron_ring.stages.sft import train_sft

    train_sft(config)


if __name__ == "__main__":
    run_entry(main)
