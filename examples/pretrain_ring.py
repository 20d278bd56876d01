"""Pre-train a Ring model: ``python examples/pretrain_ring.py --config examples/tiny/pretrain.toml``.

Every setting is a flag (``--help``); ``--dry-run`` prints the plan and stops. Several processes: torchrun or
srun.
"""

from megatron_ring.launch.entry import run_stage

if __name__ == "__main__":  # checkpoint writers spawn and import this file again
    run_stage("pretrain")
