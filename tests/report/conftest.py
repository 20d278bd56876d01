"""A small run on disk, as the metrics logger writes it."""

from dataclasses import replace

import pytest

from megatron_ring.config.dump import dump_toml
from megatron_ring.config.load import preset_config
from megatron_ring.observe.metrics import MetricsLogger


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, steps, lr=...) -> folder of a finished run with config, metrics and sample."""

    def write(name="tiny", steps=4, *, lr=1e-3, sample="def f(): pass", shift=0.0, finish=True):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = preset_config("ring_lite_tiny")
        config = replace(config, train=replace(config.train, train_iters=steps, lr=lr))
        (folder / "config.toml").write_text(dump_toml(config))
        if sample is not None:
            (folder / "sample.txt").write_text(sample)
        metrics = MetricsLogger(folder, total_steps=steps, log_interval=steps)
        for step in range(1, steps + 1):
            with metrics.phase("data"):
                pass
            values = {"loss": 8.0 / step + shift, "lr": lr, "grad_norm": 1.0, "balance_loss": 1.0 + step}
            metrics.log(step, values, tokens=1000, seconds=0.5)
            if step % 2 == 0:
                metrics.log_eval(step, {"loss": 9.0 / step + shift})
        if finish:
            metrics.close()
        return folder

    return write
