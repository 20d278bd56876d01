"""Entry points end a user's mistake in one line and exit code 2, once for a whole run."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

RAISES = """
import sys
from megatron_ring.errors import DataError
from megatron_ring.launch.entry import run_entry

def main():
    {body}

if __name__ == "__main__":
    run_entry(main)
"""

STARTS = """
import sys
from megatron_ring.launch.entry import run_entry, start

def main():
    config = start()
    print("started", config.model.num_layers, "torch" in sys.modules)

if __name__ == "__main__":
    run_entry(main)
"""

IN_A_GROUP = """
import os, sys, time
import torch
from megatron_ring.errors import DataError
from megatron_ring.launch.entry import run_entry

def main():
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if {shared} or rank == 1:
        raise DataError({line})
    # the line is in the store that lives here
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.02)

if __name__ == "__main__":
    run_entry(main)
"""


def run(code: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *argv]
    where = Path(__file__).parents[2]
    return subprocess.run(
        command, cwd=where, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def test_a_ring_error_is_one_line_and_exit_code_2():
    done = run(RAISES.format(body='raise DataError("corpus.bin is empty;\\n  fill it")'))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: corpus.bin is empty; fill it\n")


def test_ctrl_c_is_one_line_and_exit_code_130():
    done = run(RAISES.format(body="import signal; signal.raise_signal(signal.SIGINT)"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (130, "", 1)
    assert done.stderr.startswith("error: interrupted")


def test_a_return_is_exit_code_0_and_our_bugs_keep_their_traceback():
    assert run(RAISES.format(body="return 7")).returncode == 0
    done = run(RAISES.format(body="raise KeyError('step')"))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "KeyError: 'step'" in done.stderr


def test_before_the_process_group_only_the_first_rank_of_a_node_speaks():
    code = RAISES.format(body='raise DataError("x")')
    other = run(code, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert (other.returncode, other.stderr) == (2, "")
    assert run(code, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2").stderr == "error: x\n"


@pytest.mark.parametrize(
    "env", [{"LOCAL_RANK": "3"}, {"LOCAL_RANK": "third"}, {"LOCAL_RANK": "-1", "WORLD_SIZE": "2"}]
)
def test_a_line_is_said_whatever_local_rank_a_shell_was_left_with(env: dict[str, str]):
    done = run(RAISES.format(body='raise DataError("x")'), **env)
    assert (done.returncode, done.stderr) == (2, "error: x\n")


def test_a_process_whose_own_rank_is_wrong_says_so():
    body = "from megatron_ring.runtime.ranks import rank_from_env; rank_from_env()"
    done = run(RAISES.format(body=body), RANK="5", LOCAL_RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2 and done.stderr.startswith("error: RANK=5 in the environment must be")


@pytest.mark.parametrize("shared", [True, False])
def test_inside_the_process_group_one_rank_says_the_line_even_if_only_it_fails(shared: bool, tmp_path: Path):
    # the file's name is no UTF-8
    code = IN_A_GROUP.format(shared=shared, line=ascii("a\udcff.jsonl is empty; fill it"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def rank(n: int) -> subprocess.CompletedProcess[str]:
        here = {"RANK": str(n), "LOCAL_RANK": str(n), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = run(code, str(tmp_path / "ended"), **env, **here)
        if n == 1:
            (tmp_path / "ended").touch()
        return done

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(rank, range(2)))
    assert [d.returncode for d in done] == [2 if shared else 0, 2]
    lines = [line for d in done for line in d.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: a\\udcff.jsonl is empty; fill it"]
    assert "Traceback" not in done[0].stderr + done[1].stderr


WARNS = """
import warnings
from megatron_ring.launch.entry import run_entry

def main():
    warnings.warn_explicit("theirs 1", FutureWarning, "a.py", 1, module="torch.distributed.checkpoint")
    warnings.warn_explicit("theirs 2", FutureWarning, "b.py", 1, module="megatron_ring.checkpoint.megatron_io")
    warnings.warn_explicit("theirs 3", UserWarning, "c.py", 1, module="megatron.core.optimizer")
    warnings.warn_explicit("theirs 4", SyntaxWarning, "/v/lib/site-packages/d.py", 1)
    warnings.warn_explicit("ours", UserWarning, "e.py", 1, module="megatron_ring.rl")
    warnings.warn_explicit("a user's", FutureWarning, "f.py", 1, module="my_rewards")
    warnings.warn_explicit("torch's word on numbers", UserWarning, "g.py", 1, module="torch.nn")

if __name__ == "__main__":
    run_entry(main)
"""


def test_warnings_for_the_authors_of_dependencies_are_hidden_and_no_others():
    said = run(WARNS, PYTHONWARNINGS="").stderr
    assert "theirs" not in said
    assert all(word in said for word in ("ours", "a user's", "torch's word on numbers"))
    assert "theirs 1" in run(WARNS, PYTHONWARNINGS="default").stderr


def test_torchruns_report_of_the_root_cause_holds_the_line(tmp_path: Path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    done = run(RAISES.format(body='raise DataError("x")'), TORCHELASTIC_ERROR_FILE=str(file))
    assert (done.returncode, done.stderr) == (2, "error: x\n")
    report = str(ChildFailedError("ring", {0: ProcessFailure(0, 1, done.returncode, str(file))}))
    assert "traceback : error: x\n" in report and "exitcode  : 2" in report


def test_start_validates_against_the_launchers_count():
    done = run(STARTS, "--preset", "ring_lite_tiny", "--expert-model-parallel-size", "4", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: world_size=2 must be a multiple of expert_tensor_parallel_size*")
    assert done.stderr.count("\n") == 1


def test_a_mistake_is_said_also_where_the_local_rank_is_no_number():
    done = run(STARTS, "--nope", LOCAL_RANK="x")
    assert (done.returncode, done.stderr) == (2, "error: flag --nope does not exist; see --help\n")


def test_start_checks_inputs_and_gives_the_config(tmp_path: Path):
    argv = ["--preset", "ring_lite_tiny", "--data-path", str(tmp_path / "c")]
    missing = run(STARTS, *argv)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "c.idx does not exist" in missing.stderr
    for suffix in (".idx", ".bin"):
        (tmp_path / f"c{suffix}").touch()
    assert run(STARTS, *argv).stdout == "started 4 False\n"


def test_dry_run_prints_the_plan_once_and_stops():
    argv = ["--preset", "ring_lite", "--dry-run", "--world-size", "8", "--expert-model-parallel-size", "8"]
    done = run("import sys; sys.modules['torch'] = None\n" + STARTS, *argv)
    assert done.returncode == 0, done.stderr
    assert "16,801,974,272" in done.stdout and "started" not in done.stdout
    assert run(STARTS, *argv, RANK="3", LOCAL_RANK="3").stdout == ""
