"""Train a Ring model by reinforcement learning with C3PO: ``python examples/rl_ring.py --config FILE.toml``.

Every setting is a flag (``--help``); ``--dry-run`` prints the plan and stops. Several processes: torchrun or
srun.
"""

from megatron_ring.launch.entry import run_entry, start


def main() -> None:
    config = start(stage="rl")
    from megatron_ring.stages.rl import train_rl

    train_rl(config)


if __name__ == "__main__":
    run_entry(main)
