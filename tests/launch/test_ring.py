"""The installed command lists its subcommands, runs each as its script does, and saves from several processes."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from megatron_ring import __main__
from megatron_ring.data.corpus.writer import write_corpus
from megatron_ring.errors import ConfigError
from megatron_ring.launch import ranks
from megatron_ring.launch.ring import COMMANDS, main
from tests.helpers.parallel.preloaded import free_port
from tests.helpers.parallel.watching import assert_ended_well, run_to_the_end
from tests.helpers.paths import python_path

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "GLOO_SOCKET_IFNAME": "lo"}
ENV.pop("PYTHONWARNINGS", None)
SCRIPTS = {
    "pretrain": "examples/pretrain_ring.py",
    "sft": "examples/sft_ring.py",
    "rl": "examples/rl_ring.py",
    "tokenizer": "tools/train_tokenizer.py",
    "preprocess": "tools/preprocess_data.py",
    "prompts": "tools/freeze_prompts.py",
    "convert": "tools/convert_checkpoint.py",
    "verify": "tools/verify_checkpoint.py",
    "plan": "tools/plan_run.py",
    "report": "tools/report.py",
}


def ring(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{before}\nfrom megatron_ring.launch.ring import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=ENV, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_lists_every_command_and_imports_no_torch(words: list[str]):
    done = ring(*words, before="sys.modules['torch'] = sys.modules['numpy'] = None")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^  (\w+) +\w", done.stdout, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("words", [["reprot", "runs/a"], ["launch", "--nproc-per-node", "2", "reprot"]])
def test_an_unknown_command_is_one_line_with_the_closest_name(words: list[str]):
    done = ring(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command reprot does not exist; did you mean report?\n"


def test_what_runs_in_one_process_is_not_launched_in_several():
    done = ring("launch", "--nproc-per-node", "2", "report", "runs/a")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command report runs in one process; call it without launch: ring report\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: what to run, behind the launcher's flags; see --help of"),
        (["--nope", "pretrain"], "unrecognized arguments: --nope; see --help of the launcher"),
        (["--nproc-per-node", "x", "rl"], "Unsupported nproc_per_node value: x; see --help of the launcher"),
        (["--nproc-per-node", "0", "rl"], "--nproc-per-node 0 must be at least 1; name the processes of"),
        (["--monitor-interval", "0", "rl"], "--monitor-interval 0.0 must be positive; try 0.1 seconds"),
        (["--master-port", "65536", "rl"], "--master-port 65536 must be from 0 to 65535; try 29500"),
        (
            ["--rdzv-endpoint", "here:port", "rl"],
            "The port number of the rendezvous endpoint 'here:port' must be",
        ),
        (["--rdzv-backend", "etcd9", "rl"], "The rendezvous backend 'etcd9' is not registered."),
        (
            ["--nnodes", "0", "rl"],
            "min_nodes must be > 0 and <= max_nodes, got min_nodes=0, max_nodes=0; see",
        ),
        (
            ["own.py"],
            "own.py is a script, not a command; start it with python -m megatron_ring.launch.ranks ",
        ),
    ],
)
def test_a_mistake_in_the_launchers_flags_is_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["ring launch", *words])
    monkeypatch.setattr(ranks, "name_launcher", lambda: None)
    with pytest.raises(ConfigError) as caught:
        COMMANDS["launch"].run()
    assert str(caught.value).startswith(said)


def helped(monkeypatch: pytest.MonkeyPatch, argv: list[str], run) -> str:
    """The help text, without the usage's first lines, which name the program."""
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as out:
        run()
    assert ended.value.code == 0
    return out.getvalue().partition("\n\n")[2]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_command_is_its_script(name: str, monkeypatch: pytest.MonkeyPatch):
    here = helped(monkeypatch, [f"ring {name}", "--help"], COMMANDS[name].run)
    script = str(ROOT / SCRIPTS[name])
    assert here == helped(
        monkeypatch, [script, "--help"], lambda: runpy.run_path(script, run_name="__main__")
    )
    assert "--help" in here


def test_python_m_is_the_installed_command():
    assert __main__.main is main


def test_every_command_has_a_script_or_is_the_launcher():
    assert set(COMMANDS) == {*SCRIPTS, "launch"}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip writes for the entry that pyproject.toml names."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["ring"]
    module, name = entry.split(":")
    assert callable(getattr(import_module(module), name))
    file = tmp_path_factory.mktemp("bin") / "ring"
    body = f"import sys\nfrom {module} import {name}\nif __name__ == '__main__':\n    sys.exit({name}())\n"
    file.write_text(f"#!{sys.executable}\n{body}")
    file.chmod(0o755)
    return file


@pytest.fixture(scope="module")
def run_words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("run")
    with write_corpus(str(folder / "corpus"), vocab_size=512, manifest={}) as writer:
        for start in range(40):
            writer.add((np.arange(120) + 7 * start) % 500)
    words = "--preset ring_lite_tiny --num-layers 1 --vocab-size 512 --seq-length 64 --micro-batch-size 2"
    words += f" --global-batch-size 4 --eval-interval 0 --train-iters 2 --data-path {folder}/corpus"
    return [*words.split(), "--save", str(folder / "saved"), "--load", str(folder / "saved")]


def test_it_saves_from_several_processes_and_says_nothing_of_dependencies(script: Path, run_words: list[str]):
    """Checkpoint writers spawn, and import what was started again."""
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launcher = [str(script), "launch", "--nproc-per-node", "2", *address]
    done = run_to_the_end([*launcher, "pretrain", *run_words], env=ENV)
    assert_ended_well(done)
    saved = Path(run_words[-1])
    assert (saved / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert len(list((saved / "iter_0000002").glob("*.distcp"))) >= 2
    assert "Warning" not in done.stderr and "deprecated" not in done.stderr
    head = f"settings that differ from the defaults (all of them: {saved}/config.toml):"
    assert head in done.stderr and " num_layers=1 vocab_size=512 " in done.stderr
    assert (saved / "config.toml").exists()


def test_debug_shows_what_dependencies_warn_of_and_a_script_saves_alone(script: Path, run_words: list[str]):
    more = ["--train-iters", "3", "--log-level", "debug"]
    done = run_to_the_end([str(script), "pretrain", *run_words, *more], env=ENV)
    assert_ended_well(done)
    assert "Transformer Engine and Apex are not installed" in done.stderr
    assert "`load_state_dict` is deprecated" in done.stderr
    assert (Path(run_words[-1]) / "iter_0000003").is_dir()
