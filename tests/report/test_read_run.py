"""A run's folder is read as it is: finite values, each validation once, facts from its config."""

import json

import pytest

from megatron_ring.errors import ConfigError, DataError
from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.report.facts import differences, phase_seconds, rows, run_facts, shown
from megatron_ring.report.read import read_run


def test_a_run_is_read_from_its_folder_or_its_metrics_file(write_run):
    folder = write_run(steps=4)
    for path in (folder, folder / "metrics.jsonl"):
        run = read_run(path)
        assert run.name == "tiny" and run.last_step == 4 and run.ended
        assert run.series("loss").values == [8.0, 4.0, 8.0 / 3, 2.0]
        assert run.eval_series("loss").steps == [2, 4]
        assert run.config is not None and run.config.train.train_iters == 4
        assert run.sample == "def f(): pass"


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    with MetricsLogger(tmp_path, total_steps=3, log_interval=3) as metrics:
        for step, loss in enumerate([3.0, float("nan"), 1.0], start=1):
            metrics.log(step, {"loss": loss}, tokens=1, seconds=1.0)
    series = read_run(tmp_path).series("loss")
    assert series.steps == [1, 3] and series.values == [3.0, 1.0]


def test_of_two_validations_of_one_step_the_later_holds(tmp_path):
    with MetricsLogger(tmp_path, total_steps=3, log_interval=3) as metrics:
        metrics.log(1, {"loss": 1.0}, tokens=1, seconds=1.0)
        metrics.log_eval(1, {"loss": 5.0})
        metrics.log_eval(1, {"loss": 6.0})
    assert read_run(tmp_path).eval_series("loss").values == [6.0]


def test_missing_empty_and_stepless_metrics_are_one_clear_error(tmp_path):
    with pytest.raises(
        DataError, match=r"metrics.jsonl: No such file or directory; name a run that wrote one"
    ):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no training step"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run", "step": 0}\n')
    with pytest.raises(DataError, match="holds no training step"):
        read_run(tmp_path)


def test_a_config_that_does_not_load_is_one_clear_error(write_run):
    folder = write_run()
    (folder / "config.toml").write_text("[model]\nnum_layerz = 3\n")
    with pytest.raises(ConfigError, match="num_layerz"):
        read_run(folder)


def test_rows_know_which_way_is_better(write_run):
    table = {row.label: row for row in rows(read_run(write_run(steps=4)))}
    assert (table["loss"].first, table["loss"].best, table["loss"].best_step) == (8.0, 2.0, 4)
    assert table["validation loss"].last == 9.0 / 4
    assert table["gradient norm"].best is None
    assert table["tokens per second"].best == 2000.0
    assert "wall seconds" not in table and "seconds data" not in table


def test_facts_state_size_layout_and_progress(write_run):
    facts = run_facts(read_run(write_run(steps=4, finish=False)))
    assert facts["Steps"] == "4 of 4, still running or stopped"
    assert facts["Tokens"] == "4.00k"
    assert facts["Layout"] == "1 process" and facts["Precision"] == "fp32"
    assert "active per token" in facts["Size"]


def test_facts_name_the_step_a_run_was_resumed_after(tmp_path):
    for resume_step in (0, 2):
        metrics = MetricsLogger(tmp_path, total_steps=9, log_interval=9, resume_step=resume_step)
        for step in range(resume_step + 1, resume_step + 4):
            metrics.log(step, {"loss": 1.0}, tokens=1, seconds=1.0)
    facts = run_facts(read_run(tmp_path))
    assert facts["Resumed"] == "after step 2" and facts["Tokens"] == "5"


def test_phases_and_the_rest_make_up_a_step(tmp_path):
    records = [
        {"kind": "train", "step": s, "tokens": 1, "seconds": 2.0, "tokens_per_second": 0.5, "loss": 1.0,
         "seconds_data": 0.5, "seconds_optimizer": 1.0, "wall_seconds": 2.0 * s}
        for s in (1, 2)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    phases = phase_seconds(read_run(tmp_path))
    assert list(phases.items()) == [("optimizer", 1.0), ("data", 0.5), ("other", 0.5)]


def test_differences_are_the_settings_that_differ(write_run):
    runs = [read_run(write_run("a", lr=1e-3)), read_run(write_run("b", lr=2e-3))]
    assert differences(runs) == {"lr": ["0.001", "0.002"]}


def test_values_are_shown_with_their_own_digits():
    assert shown("lr", 3e-4) == "3.00e-04" and shown("lr", 0.0) == "0"
    assert shown("mfu", 0.4123) == "41.2%" and shown("tokens_per_second", 13120.0) == "13.1k"
    assert shown("loss", 3.14159) == "3.1416" and shown("z_loss", 1.23456e-5) == "1.23e-05"


GOOD = {"kind": "train", "step": 1, "tokens": 1, "seconds": 1.0, "wall_seconds": 1.0, "loss": 2.0}


@pytest.mark.parametrize(
    "line",
    [
        "[1]", "5", "null", '{"step": 1}', '{"kind": 3, "step": 1}', "[" * 100_000,
        *(json.dumps(GOOD | {name: value}) for name, value in [
            ("step", True), ("step", -1), ("step", 1.5), ("step", "1"), ("tokens", "many"), ("tokens", None),
            ("seconds", [1]), ("wall_seconds", "1"), ("wall_seconds", None), ("seconds_data", {}), ("tokens", 10**400),
        ]),
        '{"kind": "run", "step": 0, "time": 5}',
        '{"kind": "run", "step": 0, "world_size": "two"}',
    ],
)  # fmt: skip
def test_a_record_of_odd_types_is_one_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text("\n".join([json.dumps(GOOD), line, json.dumps(GOOD), ""]))
    with pytest.raises(DataError, match=r"metrics.jsonl line 2 is no metrics record"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["tokens", "seconds", "wall_seconds"])
def test_a_step_without_its_figures_is_one_line(tmp_path, name):
    record = {key: value for key, value in GOOD.items() if key != name}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=f"step 1 has no {name}; repair the file"):
        read_run(tmp_path)


def test_a_value_that_no_float_holds_leaves_a_gap(tmp_path):
    lines = [GOOD, GOOD | {"step": 2, "loss": 10**400}, GOOD | {"step": 3, "loss": "low"}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"kind": "eval", "step": 3, "loss": 1e999}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    run = read_run(tmp_path)
    assert run.series("loss").steps == [1] and run.eval_series("loss").steps == []
    assert run_facts(run)["Tokens"] == "3"


@pytest.mark.parametrize(
    "row",
    [
        "5",
        "[]",
        "{",
        "[" * 100_000,
        '{"step": "1"}',
        '{"step": 1, "prompt": 5, "response": "", "status": "", "score": 1}',
    ],
)
def test_a_sample_of_odd_types_is_one_line(write_run, row):
    folder = write_run()
    good = '{"step": 1, "prompt": "", "response": "\u2028", "status": "wrong", "score": 0.0}'
    (folder / "samples.jsonl").write_text(f"{good}\n{row}\n{good}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"samples.jsonl line 2 is no sample; repair or move the file"):
        read_run(folder)
    (folder / "samples.jsonl").write_text(f"{good}\n{row}", encoding="utf-8")
    assert len(read_run(folder).responses) == 1, "a last line that was cut short is left out"


def test_nested_toml_is_one_line(write_run):
    folder = write_run()
    for text in ("a = " + "[" * 100_000, "[model]\nnum_layers = " + "{a = " * 5000):
        (folder / "config.toml").write_text(text)
        with pytest.raises(ConfigError, match=r"config.toml is (nested too deeply|not valid TOML)") as caught:
            read_run(folder)
        assert "\n" not in str(caught.value)
