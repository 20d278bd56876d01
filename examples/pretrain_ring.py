"""Pre-train a Ring model: ``python examples/pretrain_ring.py --config examples/tiny/pretrain.toml``.

Every setting is a flag (``--help``); ``--dry-run`` prints the plan and stops. Several processes: torchrun or
srun.
"""

from megatron_ring.launch.entry import run_entry, start


def main() -> None:
    config = start()
    from megatron_ring.stages.pretrain import pretrain

    pretrain(config)


if __name__ == "__main__":
    run_entry(main)
