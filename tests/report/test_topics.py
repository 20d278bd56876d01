"""Every metric stands under one topic, and a run is judged by the same few everywhere."""

import json
import re

from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.report.facts import quantities
from megatron_ring.report.page import render_report
from megatron_ring.report.read import read_run
from megatron_ring.report.topics import OTHER, TOPICS, by_topic, headline


def test_the_docstrings_example():
    assert by_topic(["lr", "mine", "reward"]) == {
        "What was learnt": ["reward"],
        "Optimizer step": ["lr"],
        "Other": ["mine"],
    }


def test_every_name_is_in_exactly_one_topic():
    listed = [
        entry + "x" if entry.endswith("/") else entry for entries in TOPICS.values() for entry in entries
    ]
    names = [*listed, "reward", "mine", "mine/too", "rewards"]
    grouped = by_topic(names)
    assert sorted(name for topic in grouped.values() for name in topic) == sorted(set(names))
    assert grouped[OTHER] == ["mine", "mine/too", "rewards"]
    assert list(grouped) == [*TOPICS, OTHER]


def test_the_telling_names_of_a_topic_come_first():
    names = ["c3po/carried", "c3po/shortfall", "c3po/utilisation"]
    assert by_topic(names) == {"Budget": ["c3po/utilisation", "c3po/shortfall", "c3po/carried"]}


def test_a_run_is_judged_by_its_reward_or_by_its_loss():
    names = ["lr", "loss", "entropy", "tokens_per_second", "mine"]
    assert headline(names) == ["loss", "lr", "tokens_per_second"]
    assert headline([*names, "reward"]) == ["reward", "entropy", "tokens_per_second", "lr"]


def test_the_page_has_every_metric_in_its_topic_and_folds_all_but_the_first(tmp_path):
    values = {
        "reward": 0.5,
        "c3po/utilisation": 1.0,
        "packing/fill": 0.9,
        "max_violation": 0.1,
        "mismatch": 1e-6,
        "x": 3.0,
    }
    with MetricsLogger(tmp_path, total_steps=1, log_interval=1) as metrics:
        metrics.log(1, values, tokens=1, seconds=1.0)
        metrics.log_eval(1, {"accuracy": 0.25})
    page = render_report(tmp_path, tmp_path / "report.html").read_text()
    sections = re.findall(
        r"<details( open)?><summary>([^<]*)<small>([^<]*)</small></summary>(.*?)</details>", page, re.S
    )
    found = {title: re.findall(r'<th title="([^"]*)"', inside) for _, title, _, inside in sections}
    assert found == {
        "What was learnt": ["reward", "accuracy"],
        "Budget": ["c3po/utilisation"],
        "Packing": ["packing/fill"],
        "Experts": ["max_violation"],
        "Mismatch of rollout and trainer": ["mismatch"],
        "Speed": ["tokens_per_second"],
        "Other": ["x"],
    }
    assert [opened for opened, *_ in sections] == [" open"] + [""] * 6
    assert sections[1][2] == "utilisation 1.0000"


def test_a_metric_of_a_run_is_never_lost(tmp_path):
    record = {"kind": "train", "step": 1, "tokens": 1, "seconds": 1.0, "wall_seconds": 1.0}
    record |= {f"kind{n}/name{n}": float(n) for n in range(20)} | {"status/odd": 1.0, "seconds_data": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    names = quantities(read_run(tmp_path))
    assert len(names) == 21 and sum(map(len, by_topic(names).values())) == 21
