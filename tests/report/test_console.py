"""The closing table says how the run went, where its files are and what to do next, ready to copy."""

import io

from rich.console import Console

from megatron_ring.report.console import print_summary


def said(folder, width=80, **arguments):
    out = io.StringIO()
    print_summary(folder, console=Console(file=out, width=width, highlight=False), **arguments)
    return out.getvalue()


def test_the_summary_names_quantities_facts_files_and_commands(write_run):
    text = said(
        write_run(),
        files=[("report", "runs/tiny/report.html")],
        next_commands=[("look closer", "python x.py")],
    )
    words = " ".join(text.split())
    assert "validation loss 4.5000 2.2500 @ 4 2.2500" in words
    assert "Steps 4 of 4" in words and "def f(): pass" in words
    assert "report runs/tiny/report.html" in words and "# look closer python x.py" in words
    assert "\x1b" not in text


def test_commands_and_text_in_brackets_stay_as_they_are(write_run):
    command = "python examples/pretrain_ring.py --data-path " + "corpus/" * 20
    lines = said(write_run(sample="[bold]x[/bold]"), next_commands=[("train", command)]).splitlines()
    assert f"  {command}" in lines and "[bold]x[/bold]" in lines
