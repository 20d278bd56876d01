"""The page stands alone, shows what the run wrote and lets nothing of it act as HTML."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ring.errors import DataError
from megatron_ring.report.page import render_comparison, render_report
from tests.helpers.paths import python_path

TOOL = Path(__file__).parents[2] / "tools" / "report.py"


class Checker(HTMLParser):
    """Collects the tags and every address a browser would fetch."""

    def __init__(self, page):
        super().__init__()
        self.open, self.fetched, self.seen = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(write_run):
    folder = write_run()
    page = render_report(folder, folder / "report.html").read_text()
    checked = Checker(page)
    assert checked.open == [] and "script" not in checked.seen
    assert len(checked.fetched) == 2 and all(
        a.startswith("data:image/svg+xml;base64,") for a in checked.fetched
    )
    assert "url(" not in page and "@import" not in page
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*tmp"))


def test_the_page_says_first_best_last_facts_phases_and_settings(write_run):
    folder = write_run()
    text = re.sub(r"<[^>]+>", " ", render_report(folder, folder / "report.html").read_text())
    said = re.sub(r"\s+", " ", text)
    assert "validation loss 4.5000 2.2500 step 4 2.2500" in said
    assert "4 of 4" in said and "active per token" in said and "ms of a step go" in said
    assert "train_iters = 4" in said and "def f(): pass" in said


def test_a_run_without_figures_to_draw_is_one_line_and_one_without_speed_has_a_page(tmp_path):
    record = {"kind": "train", "step": 1, "tokens": 1, "seconds": 1.0, "wall_seconds": 1.0, "loss": None}
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(record) + "\n")
    for draw in (render_report, lambda run, out: render_comparison([run, run], out)):
        with pytest.raises(DataError, match="no step has a finite quantity to draw; name another run"):
            draw(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    file.write_text(json.dumps(record | {"loss": 3.5}) + "\n")
    assert "tokens per second" not in render_report(tmp_path, tmp_path / "report.html").read_text()


def test_what_a_run_wrote_cannot_act_as_html(write_run):
    folder = write_run("<img src=x>", sample='<script>alert(1)</script> & "more"')
    page = render_report(folder, folder / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page
    assert "<img src=x>" not in page


def test_the_same_run_gives_the_same_page(write_run):
    folder = write_run()
    first = render_report(folder, folder / "a.html").read_bytes()
    assert render_report(folder, folder / "b.html").read_bytes() == first


def test_a_comparison_has_a_column_a_run_and_the_settings_that_differ(write_run, tmp_path):
    runs = [write_run("a", lr=1e-3), write_run("b", lr=2e-3, shift=0.5)]
    page = render_comparison(runs, tmp_path / "out" / "ab.html").read_text()
    assert Checker(page).open == [] and (tmp_path / "out" / "loss.png").exists()
    said = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "Settings that differ a b lr 0.001 0.002" in said
    assert "loss 2.0000 best 2.0000 2.5000 best 2.5000" in said


def test_runs_of_one_name_are_told_apart_by_their_folder(write_run, tmp_path):
    runs = [write_run("x/run"), write_run("y/run")]
    page = render_comparison(runs, tmp_path / "ab.html").read_text()
    assert str(Path("x", "run")) in page and str(Path("y", "run")) in page


def test_a_place_that_cannot_be_written_is_one_clear_error(write_run):
    folder = write_run()
    with pytest.raises(DataError, match=r"report .*: .*; name a file that can be written with --out"):
        render_report(folder, folder / "sample.txt" / "report.html")


def tool(*arguments, cwd):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=None, check=False)


def test_the_tool_writes_beside_the_run_and_refuses_in_one_line(write_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_path())
    folder = write_run()
    done = tool(folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "report.html"), str(folder / "loss.png")]
    refused = tool(tmp_path / "nowhere", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stdout == ""
    assert re.fullmatch(r"error: metrics file .*nowhere.*; name a run that wrote one\n", refused.stderr)


def test_the_last_steps_responses_are_shown_as_text(write_run):
    folder = write_run()
    row = {"prompt": "1 + 1 = ?", "score": 0.0, "status": "wrong", "tokens": 3, "stop": "eos"}
    rows = [{**row, "step": 2, "response": "older"}, {**row, "step": 4, "response": "<script>3</script>"}]
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "pro'
    )
    page = render_report(folder, folder / "report.html").read_text()
    assert "responses of step 4" in page and "&lt;script&gt;3" in page
    assert "older" not in page and "script" not in Checker(page).seen


def test_a_page_takes_no_device_from_its_place(write_run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="pipe: is no plain file; name a file that can be written with --out"):
        render_report(write_run(), pipe)
    assert pipe.is_fifo() and not (tmp_path / "loss.png").exists()
