"""The training stages as commands: read the command line first, import the stage after that."""

from megatron_ring.launch.entry import start


def pretrain() -> None:
    config = start()
    from megatron_ring.stages.pretrain import pretrain

    pretrain(config)


def sft() -> None:
    config = start(stage="sft")
    from megatron_ring.stages.sft import train_sft

    train_sft(config)


def rl() -> None:
    config = start(stage="rl")
    from megatron_ring.stages.rl import train_rl

    train_rl(config)
