"""Wrong input given to the real entry points: one line, exit code 2, and nothing half-written.

The scripts run in this process under their own name, as ``python examples/...`` runs them. What the configuration
alone decides is in ``tests/config``; here the mistake lies in a file, a folder or a disk.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.e2e.runs import ROOT, TINY, flags
from tests.helpers.paths import python_path

PRETRAIN = "examples/pretrain_ring.py"


def files_under(folder: Path) -> dict[str, bytes]:
    """Every file's content, so that a change shows."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch, capsys) -> Callable[..., str]:
    """Run a script with words it must refuse; its one line comes back."""

    def run(script: str, words: list[str], **environment: str) -> str:
        before = files_under(tmp_path)
        monkeypatch.setattr("sys.argv", [script, *words])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        stderr = capsys.readouterr().err
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert ended.value.code == 2, stderr
        assert len(lines) == 1 and "Traceback" not in stderr, stderr
        assert files_under(tmp_path) == before, "something was written or changed"
        return lines[0]

    return run


@pytest.fixture
def settings(corpus, tmp_path) -> dict[str, object]:
    """A run that would work, on a copy of the corpus to do damage to."""
    prefix = Path(str(corpus["data-path"]))
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        shutil.copy(path, tmp_path)
    return (
        TINY
        | corpus
        | {
            "data-path": str(tmp_path / prefix.name),
            "train-iters": 2,
            "lr-warmup-iters": 0,
            "log-level": "error",
        }
    )


def test_a_missing_corpus(refused, settings, tmp_path):
    line = refused(PRETRAIN, flags(settings | {"data-path": tmp_path / "nowhere"}))
    assert f"{tmp_path}/nowhere.idx does not exist" in line


def test_a_corrupt_index(refused, settings):
    path = Path(str(settings["data-path"]) + ".idx")
    path.write_bytes(b"garbage" + path.read_bytes()[7:])
    assert f"{path} is not a Megatron index" in refused(PRETRAIN, flags(settings))


def test_a_corpus_cut_short(refused, settings):
    path = Path(str(settings["data-path"]) + ".bin")
    os.truncate(path, path.stat().st_size // 2)
    assert f"{path} has {path.stat().st_size} bytes" in refused(PRETRAIN, flags(settings))


def test_a_tokenizer_the_corpus_was_not_made_with(refused, settings, tmp_path):
    from megatron_ring.data.corpus.builtin import builtin_documents
    from megatron_ring.data.text.tokenizer_training import train_tokenizer

    train_tokenizer(builtin_documents(0.2), tmp_path / "other.model", vocab_size=400)
    line = refused(PRETRAIN, flags(settings | {"tokenizer-model": tmp_path / "other.model"}))
    assert "was made with another tokenizer" in line and "preprocess it again" in line


def test_a_file_that_is_no_tokenizer(refused, settings, tmp_path):
    (tmp_path / "bad.model").write_bytes(b"\0\1\2 not a model")
    line = refused(PRETRAIN, flags(settings | {"tokenizer-model": tmp_path / "bad.model"}))
    assert "bad.model" in line


def test_a_vocabulary_smaller_than_the_tokenizers(refused, settings):
    line = refused(PRETRAIN, flags(settings | {"vocab-size": 256}))
    assert "512" in line and "256" in line


def test_token_ids_past_the_vocabulary_without_a_tokenizer_to_tell(refused, settings):
    words = {name: value for name, value in settings.items() if name != "tokenizer-model"}
    line = refused(PRETRAIN, flags(words | {"vocab-size": 256}))
    assert "256" in line and str(settings["data-path"]) in line


def test_a_split_without_validation_documents(refused, settings):
    line = refused(PRETRAIN, flags(settings | {"split": "100,0,0", "eval-interval": 1}))
    assert "100,0,0" in line


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A run of one step, saved."""
    from megatron_ring.config.load import load_config
    from megatron_ring.stages.pretrain import pretrain

    folder = tmp_path_factory.mktemp("trained") / "run"
    once = {"save": folder, "train-iters": 1, "lr-warmup-iters": 0, "log-level": "error"}
    pretrain(load_config(flags(TINY | corpus | once)))
    return folder


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_checkpoint_of_another_model(refused, settings, run_copy):
    line = refused(PRETRAIN, flags(settings | {"load": run_copy, "num-layers": 4}))
    assert "another model: num_layers=2 there but 4 here" in line


def test_a_checkpoint_cut_short(refused, settings, run_copy):
    path = run_copy / "iter_0000001" / "__0_0.distcp"
    os.truncate(path, 1000)
    assert f"{path}: has 1,000 of at least" in refused(PRETRAIN, flags(settings | {"load": run_copy}))


def _with_trainer(run: Path, trainer: object) -> None:
    path = run / "iter_0000001/trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainer": trainer}))


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        (None, "holds None for trainer, which is an object"),
        ([], "holds a list for trainer, which is an object"),
        ({}, "trainer state lacks 'step'"),
        ({"step": 1}, "trainer state lacks 'cursor'"),
        ({"step": 1, "cursor": [], "spikes": {}}, "trainer state "),
    ],
)
def test_a_checkpoint_whose_trainer_state_is_none(refused, settings, run_copy, trainer, said):
    """It must not begin at step 0 and write over what it could not read."""
    _with_trainer(run_copy, trainer)
    line = refused(PRETRAIN, flags(settings | {"load": run_copy, "save": run_copy}))
    assert said in line and "load a " in line


def test_a_folder_in_which_another_run_writes(refused, settings, run_copy):
    code = "import sys, time; from megatron_ring.checkpoint.run_lock import hold_run_folder as hold\n"
    code += "with hold(sys.argv[1]): print('held', flush=True); time.sleep(300)"
    words = [sys.executable, "-c", code, str(run_copy)]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        line = refused(PRETRAIN, flags(settings | {"save": run_copy}))
        assert f"process {other.pid} on " in line and "writes its checkpoints there" in line
        other.kill()


def test_a_pointer_to_a_checkpoint_that_is_gone(refused, settings, run_copy):
    (run_copy / "latest_checkpointed_iteration.txt").write_text("7\n")
    line = refused(PRETRAIN, flags(settings | {"load": run_copy}))
    assert "names step 7, which is not there (found: 1)" in line


def test_a_resumed_run_on_another_corpus(refused, settings, run_copy):
    line = refused(PRETRAIN, flags(settings | {"load": run_copy, "split": "50,50,0"}))
    assert "corpus" in line or "data" in line


def test_a_folder_to_load_that_is_none(refused, settings, tmp_path):
    line = refused(PRETRAIN, flags(settings | {"load": tmp_path / "gone"}))
    assert f"load={tmp_path}/gone is not a folder" in line


def test_a_file_in_place_of_the_folder_to_save_to(refused, settings, tmp_path):
    (tmp_path / "taken").write_text("mine")
    line = refused(PRETRAIN, flags(settings | {"save": tmp_path / "taken"}))
    assert f"{tmp_path}/taken" in line and "folder" in line


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A real file system with room for settings and metrics but not for a checkpoint."""
    disk = tmp_path.with_name(tmp_path.name + "-disk")
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk(refused, settings, full_disk):
    line = refused(PRETRAIN, flags(settings | {"save": full_disk / "run"}))
    assert "GB free but the checkpoint of step 2 needs" in line and "free space" in line
    left = {path.name for path in (full_disk / "run").iterdir()}
    assert not {name for name in left if name.startswith(("iter_", "latest")) or name.endswith(".tmp")}, left


def test_an_unknown_flag(refused, settings):
    line = refused(PRETRAIN, [*flags(settings), "--learning-rate", "1"])
    assert "--learning-rate" in line


def test_tensor_parallel_experts_without_sequence_parallel(refused, settings):
    line = refused(PRETRAIN, flags(settings | {"tensor-model-parallel-size": 2}), WORLD_SIZE="2")
    assert "sequence_parallel" in line or "--sequence-parallel" in line


def test_a_spike_factor_that_skips_everything(refused, settings):
    line = refused(PRETRAIN, flags(settings | {"loss-spike-factor": 0.5}))
    assert "loss_spike_factor=0.5 must be 0 (off) or above 1; try 1.5" in line


def test_transformer_engine_where_there_is_none(refused, settings, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine", None)
    line = refused(PRETRAIN, flags(settings | {"transformer-impl": "transformer_engine"}))
    assert "transformer_impl=transformer_engine" in line


def test_a_toml_file_that_is_none(refused, tmp_path):
    (tmp_path / "run.toml").write_text("[train\nlr = 1")
    assert "run.toml is not valid TOML" in refused(PRETRAIN, ["--config", str(tmp_path / "run.toml")])


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("tools/report.py", ["{tmp}/nowhere"], "nowhere"),
        ("tools/report.py", ["{tmp}", "--wrong"], "--wrong"),
        ("tools/plan_run.py", ["--gpus", "0", "--memory-gib", "80"], "--gpus 0"),
        ("tools/plan_run.py", ["--gpus", "8", "--memory-gib", "1", "--preset", "ring_lite"], "no layout"),
        ("tools/convert_checkpoint.py", ["hf-to-megatron", "{tmp}/nowhere", "{tmp}/out"], "nowhere"),
        ("tools/convert_checkpoint.py", ["sideways"], "sideways"),
        ("tools/preprocess_data.py", ["--builtin-corpus", "--output-prefix", "{tmp}/c"], "tokenizer"),
        ("tools/train_tokenizer.py", ["--input", "{tmp}/nowhere", "--output", "{tmp}/t.model"], "nowhere"),
    ],
)
def test_the_tools_refuse_in_one_line_too(refused, tmp_path, script, words, said):
    assert said in refused(script, [word.format(tmp=tmp_path) for word in words])


SFT, RL = "examples/sft_ring.py", "examples/rl_ring.py"
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"KEYS}]FIELDS}\n'
PROBLEM = '{"prompt": "a", "domain": "math", "answer": "1"}\n'


@pytest.fixture
def reads(corpus) -> dict[str, object]:
    """A run that needs nothing but its data."""
    tokenizer = {"tokenizer-model": corpus["tokenizer-model"], "log-level": "error"}
    return TINY | tokenizer | {"train-iters": 1, "lr-warmup-iters": 0}


@pytest.mark.parametrize(
    ("keys", "fields", "said"),
    [
        (', "tool_calls": [{"type": "function"}]', "", "a.jsonl:2: message 1: tool_calls is not read"),
        ("", ', "tools": [{"type": "function"}]', "a.jsonl:2: tools are not read by this chat template"),
        (', "weight": 0', "", "a.jsonl:2: every answer has weight 0"),
        ("", ', "chat_template_kwargs": {"enable_thinking": false}', "a.jsonl:2: chat_template_kwargs: "),
        ("", ', "extra": ' + "[" * 3000 + "]" * 3000, "a.jsonl:2 is nested too deeply, more than 64 deep"),
    ],
)
def test_a_conversation_that_says_more_than_is_read(refused, reads, tmp_path, keys, fields, said):
    text = CHAT.replace("KEYS", "").replace("FIELDS", "") + CHAT.replace("KEYS", keys).replace(
        "FIELDS", fields
    )
    (tmp_path / "a.jsonl").write_text(text)
    assert said in refused(SFT, flags(reads | {"sft-data": tmp_path / "a.jsonl"}))


def test_a_template_name_that_no_template_reads(refused, reads, tmp_path):
    (tmp_path / "a.jsonl").write_text(CHAT.replace("KEYS", "").replace("FIELDS", ""))
    words = flags(reads | {"sft-data": tmp_path / "a.jsonl"})
    assert "must be a JSON object" in refused(SFT, [*words, "--chat-template-kwargs", "[1]"])
    line = refused(SFT, [*words, "--chat-template-kwargs", '{"enable_thinking": false}'])
    assert "this chat template does not read enable_thinking" in line


def test_problems_that_nobody_can_judge(refused, reads, tmp_path):
    (tmp_path / "p.jsonl").write_text(PROBLEM + '{"prompt": "f", "domain": "code", "tests": []}\n')
    words = reads | {
        "prompt-data": tmp_path / "p.jsonl",
        "prompts-per-step": 2,
        "group-size": 2,
        "token-budget": 8,
    }
    words |= {"max-prompt-length": 16, "max-response-length": 16, "microbatch-capacity": 64}
    line = refused(RL, flags(words))
    assert f"{tmp_path}/p.jsonl:2: " in line and "1 problem that no verifier can check" in line
    (tmp_path / "e.jsonl").write_text('{"prompt": "A ", "domain": "math", "answer": "1"}\n')
    (tmp_path / "p.jsonl").write_text(PROBLEM)
    line = refused(RL, flags(words | {"eval-prompt-data": tmp_path / "e.jsonl"}))
    assert "p.jsonl: all of its 1 problems are held out" in line
    line = refused(RL, flags(words | {"stop-token-ids": 512}))
    assert "stop_token_ids=512 must be below the tokenizer's 512 tokens" in line
