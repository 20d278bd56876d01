"""What the stages share."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_ring.config.load import config_from_mapping, preset_config
from megatron_ring.errors import ConfigError
from megatron_ring.stages import run as stage_run
from megatron_ring.stages.run import StageRun


@pytest.mark.parametrize(
    ("rank", "level", "heard"),
    [
        (0, "info", {"warning"}),
        (1, "info", {"note", "warning"}),
        (0, "error", set()),
        (1, "error", set()),
    ],
)
def test_of_several_processes_the_writer_alone_says_what_is_no_warning(
    monkeypatch, capfd, rank, level, heard
):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(stage_run, "open_session", lambda *_, **__: _Nothing())
    # as in a fresh process
    monkeypatch.setattr(logging.root, "handlers", [])
    names = ("megatron_ring", "megatron.core")
    before = [logging.root.level, *(logging.getLogger(name).level for name in names)]
    try:
        with stage_run.open_stage(config_from_mapping({"log_level": level})):
            logging.getLogger("megatron_ring.kernels").info("note")
            logging.getLogger("megatron_ring").warning("warning")
    finally:
        for name, value in zip((None, *names), before, strict=True):
            logging.getLogger(name).setLevel(value)
    assert set(capfd.readouterr().err.split()) == heard


@pytest.mark.parametrize("flag", ["--metrics-file", "--save"])
def test_a_folder_that_cannot_be_written_is_said_by_the_flag_that_names_it(tmp_path, flag):
    (tmp_path / "file").touch()
    word = str(tmp_path / "file" / ("m.jsonl" if flag == "--metrics-file" else "run"))
    run = StageRun.__new__(StageRun)
    run.config = config_from_mapping({flag.strip("-").replace("-", "_"): word})
    run.session, run.stage, run.step = SimpleNamespace(is_log_rank=True), "pretrain", 0
    with pytest.raises(ConfigError, match=f"^{flag}.* {tmp_path}/file.*; name a folder that can be written"):
        run._announce()


def test_a_run_that_saves_among_checkpoints_it_does_not_resume_says_so(tmp_path, caplog):
    """Without --load it begins at step 0 and replaces what an earlier run saved."""
    for step in (3, 12):
        (tmp_path / f"iter_{step:07d}").mkdir()
    line = (
        f"--save {tmp_path} holds checkpoints of an earlier run (last: step 12), which this run does not resume: it "
        f"replaces those of its own steps; to resume add --load {tmp_path}, else name another folder"
    )
    for loaded, heard in (
        (None, [line]),
        (tmp_path.parent / "other" / "iter_0000003", [line]),
        (tmp_path / "iter_0000012", []),
    ):
        caplog.clear()
        run = StageRun.__new__(StageRun)
        run.config = config_from_mapping({"save": str(tmp_path), "add_qkv_bias": True})
        run.session, run.stage, run.step = SimpleNamespace(is_log_rank=True), "pretrain", 0
        run.checkpointer = SimpleNamespace(loaded_folder=loaded)
        run._announce()
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == heard


@pytest.mark.parametrize(("step", "heard"), [(3, False), (4, True), (9, True)])
def test_a_run_that_has_nothing_left_to_train_says_so(tmp_path, caplog, step, heard):
    caplog.set_level(logging.INFO)
    run = StageRun.__new__(StageRun)
    run.config = config_from_mapping({"save": str(tmp_path), "train_iters": 4, "add_qkv_bias": True})
    run.session, run.stage, run.step = SimpleNamespace(is_log_rank=True), "pretrain", step
    run.checkpointer = SimpleNamespace(loaded_folder=None)
    run._announce()
    line = f"nothing is left to train: the checkpoint is of step {step} and train_iters=4; raise --train-iters to go on"
    assert (line in [record.message for record in caplog.records]) == heard


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, []),
        (
            {"moe_shared_expert_intermediate_size": 64, "first_k_dense_replace": 1},
            ["moe_shared_expert_intermediate_size=64", "first_k_dense_replace=1"],
        ),
    ],
)
def test_a_run_warns_of_what_its_models_config_json_could_not_say(changes, warned, caplog):
    run = StageRun.__new__(StageRun)
    config = preset_config("qwen3_moe_tiny")
    run.config = replace(config, model=replace(config.model, **changes))
    run.session, run.stage, run.step = SimpleNamespace(is_log_rank=True), "pretrain", 0
    run.checkpointer = SimpleNamespace(loaded_folder=None)
    with caplog.at_level(logging.WARNING):
        run._announce()
    assert [record.getMessage().split()[8] for record in caplog.records] == warned
    assert all("cannot be exported to Hugging Face" in record.getMessage() for record in caplog.records)


def test_a_sample_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    """The last thing of a run, behind its last checkpoint."""
    (tmp_path / "sample.txt").mkdir()
    run = StageRun.__new__(StageRun)
    run.config = config_from_mapping({"save": str(tmp_path), "add_qkv_bias": True})
    run.session, run.engine = SimpleNamespace(is_log_rank=True), None
    run.tokenizer = SimpleNamespace(stop_ids=(), decode=str)
    monkeypatch.setattr(stage_run, "continue_tokens", lambda *_, **__: [])
    monkeypatch.setattr(run, "sample_prompt", lambda: [1])
    with pytest.raises(
        ConfigError, match=r"sample\.txt: Is a directory; check that .* the checkpoint is saved"
    ):
        run._write_sample()


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None
