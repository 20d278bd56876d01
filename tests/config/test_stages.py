"""Each stage refuses in one line what it alone cannot do, asks for its own inputs, and prints its own sections."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ring.config.check import check_inputs, validate
from megatron_ring.config.dump import format_config
from megatron_ring.config.load import load_config
from megatron_ring.config.stages import STAGES, register_stage, stage_spec
from megatron_ring.errors import CheckpointError, ConfigError, DataError
from megatron_ring.launch.dry_run import dry_run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

# flags, processes, how the line starts
SFT = [
    ("--chat-template-kwargs [1]", 1, "chat_template_kwargs=[1] must be a JSON object; try "),
    ("--chat-template-kwargs {", 1, "chat_template_kwargs={ must be a JSON object; try "),
    ("--sft-epochs 0", 1, "sft_epochs=0.0 must be positive; try 3"),
    ("--sft-warmup-fraction 1", 1, "sft_warmup_fraction=1.0 must be from 0 to below 1; try 0.01"),
    ("--sft-save-every-epoch", 1, "sft_save_every_epoch=True needs a folder to save in; set --save FOLDER"),
    ("--eval-interval 5", 1, "eval_interval=5 needs conversations to validate on; set --sft-eval-data"),
    ("--loss-spike-factor 2", 1, "loss_spike_factor=2.0 is for pre-training; set it to 0"),
    ("--rampup-batch-size 4 4 16", 1, "rampup_batch_size is for pre-training"),
    ("--train-iters -1", 1, "train_iters=-1 must be at least 0"),
    ("--num-workers -1", 1, "num_workers=-1 must be at least 0; 0 reads in the training process"),
]
RL = [
    ("--train-iters 0", 1, "train_iters=0 must be at least 1"),
    ("--prompt-data 0.5 a 0.5", 1, "prompt_data has 3 words, but a blend is pairs; write weight source"),
    ("--eval-prompt-data 0 a 1 b", 1, "eval_prompt_data weight 0 must be a positive number"),
    ("--prompts-per-step 6", 4, "prompts_per_step=6 must be a multiple of data_parallel_size=4; try 4 or 8"),
    ("--group-size 1", 1, "group_size=1 gives advantage_estimator=group_norm nothing to compare; try 16"),
    ("--stop-token-ids 3 -1", 1, "stop_token_ids=3 -1: -1 must be at least 0; set --stop-token-ids"),
    ("--temperature 0", 1, "temperature=0.0 must be positive; try 1.0"),
    ("--top-p 1.5", 1, "top_p=1.5 must be above 0 and at most 1"),
    ("--solve-rate-min 0.9 --solve-rate-max 0.1", 1, "solve_rate_min=0.9 and solve_rate_max=0.1 must be"),
    (
        "--max-response-length 600 --max-position-embeddings 512",
        1,
        "max_prompt_length+max_response_length=32+600=632 must be at most max_position_embeddings=512",
    ),
    ("--microbatch-capacity 64", 1, "max_prompt_length+max_response_length=32+64=96 must fit into"),
    ("--token-budget -1", 1, "token_budget=-1 must be at least 0"),
    ("--rollout-concurrency -1", 1, "rollout_concurrency=-1 must be at least 0"),
    ("--advantage-estimator gae", 1, "advantage_estimator=gae needs a value model; add --critic"),
    ("--eps-clip 0", 1, "eps_clip=0.0 must be above 0 and at most 1"),
    ("--eps-clip 1.1", 1, "eps_clip=1.1 must be above 0 and at most 1"),
    ("--eps-clip-c 0.5", 1, "eps_clip_c=0.5 must be 0 (off) or above 1"),
    ("--mismatch-low -1", 1, "mismatch_low=-1.0 must be at least 0"),
    ("--reward-workers 0", 1, "reward_workers=0 must be at least 1"),
    ("--reward-timeout 0", 1, "reward_timeout=0.0 must be above 0 and at most 86400; try 10 seconds"),
    ("--reward-timeout 1e20", 1, "reward_timeout=1e+20 must be above 0 and at most 86400; try 10 seconds"),
    ("--sandbox-timeout 1e20", 1, "sandbox_timeout=1e+20 must be above 0 and at most 86400; try 5 seconds"),
    ("--reward-functions rhymes", 1, "reward_functions=rhymes must be domain=module:function"),
]
BASE = {
    "sft": ["--train-iters", "0"],
    "rl": ["--max-prompt-length", "32", "--max-response-length", "64", "--lr-warmup-iters", "0"],
}


def config(stage: str, flags: str = ""):
    return load_config(["--preset", "ring_lite_tiny", *BASE[stage], *flags.split()])


@pytest.mark.parametrize(
    ("stage", "flags", "processes", "line"), [*(("sft", *w) for w in SFT), *(("rl", *w) for w in RL)]
)
def test_one_line_names_value_rule_and_remedy(stage, flags, processes, line):
    with pytest.raises(ConfigError) as caught:
        validate(config(stage, flags), processes, stage)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_what_is_right_passes():
    for stage in ("sft", "rl"):
        validate(config(stage), 1, stage)
    with pytest.raises(ConfigError, match="train_iters=0 must be at least 1"):
        validate(config("sft"), 1)
    # the corpus' split is nothing that fine-tuning reads
    validate(config("sft", "--split nonsense"), 1, "sft")


def test_weights_to_start_from_are_named_once():
    line = "finetune=True and pretrained_checkpoint=a both say which weights to start from; drop --finetune"
    with pytest.raises(ConfigError, match=line):
        validate(config("sft", "--finetune --load b --pretrained-checkpoint a"), 1, "sft")


def test_each_stage_asks_for_its_own_inputs(tmp_path: Path):
    data, tokenizer = tmp_path / "a.jsonl", tmp_path / "t.model"

    def refused(stage, error: type[Exception], **words: object) -> str:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in words.items())
        with pytest.raises(error) as caught:
            check_inputs(config(stage, flags), stage)
        return str(caught.value)

    for stage, name, what in (("sft", "sft_data", "conversations"), ("rl", "prompt_data", "problems")):
        assert refused(stage, DataError).startswith(f"{name} is empty")
        words = {name: data}
        data.unlink(missing_ok=True)
        assert refused(stage, DataError, **words).startswith(
            f"{name}={data} does not exist; name a JSONL file of {what}"
        )
        data.touch()
        assert refused(stage, DataError, **words).startswith(
            "tokenizer_model is not set, and the data is text; set --tokenizer-model PATH"
        )
        assert "t.model does not exist" in refused(stage, DataError, **words, tokenizer_model=tokenizer)
        tokenizer.touch()
        words["tokenizer_model"] = tokenizer
        check_inputs(config(stage, " ".join(f"--{k.replace('_', '-')} {v}" for k, v in words.items())), stage)
        gone = refused(stage, CheckpointError, **words, pretrained_checkpoint=tmp_path / "gone")
        assert (
            gone == f"pretrained_checkpoint={tmp_path}/gone is not a folder; name one that holds checkpoints"
        )
        tokenizer.unlink()
    gym = f"--prompt-data 1 reasoning_gym:chain_sum 1 {data} --tokenizer-model {data}"
    check_inputs(config("rl", gym), "rl")


@pytest.mark.parametrize(
    ("stage", "shown", "hidden"),
    [
        ("pretrain", "lr", "sft_epochs"),
        ("sft", "sft_epochs", "group_size"),
        ("rl", "group_size", "sft_epochs"),
    ],
)
def test_only_the_sections_of_a_stage_are_printed(stage, shown, hidden):
    lines = format_config(load_config([]), STAGES[stage].sections).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(STAGES[stage].sections)
    names = {line.split()[-2] for line in lines if line.startswith(" ")}
    assert shown in names and hidden not in names


@pytest.mark.parametrize(("config_file", "processes"), [("tiny/sft.toml", 1), ("ring_lite/sft.toml", 256)])
def test_the_examples_are_valid_where_they_run(config_file: str, processes: int):
    validate(load_config(["--config", str(EXAMPLES / config_file)]), processes, "sft")


def test_ring_lite_is_fine_tuned_with_the_papers_settings():
    run = load_config(["--config", str(EXAMPLES / "ring_lite/sft.toml")])
    train, sft = run.train, run.sft
    assert (train.lr, train.lr_decay_style, train.weight_decay) == (3e-4, "cosine", 0.1)
    assert (train.global_batch_size, train.seq_length, train.train_iters) == (256, 32768, 0)
    assert (sft.sft_epochs, sft.sft_warmup_fraction, run.model.rotary_base) == (3, 0.01, 600_000)


def test_an_unknown_stage_is_one_line_and_a_name_is_given_once():
    with pytest.raises(ConfigError) as caught:
        stage_spec("distil")
    assert str(caught.value) == "stage distil does not exist; try one of pretrain, sft, rl"
    with pytest.raises(ValueError, match="stage rl exists"):
        register_stage(STAGES["rl"])
    with pytest.raises(ValueError, match="stage haiku: section modle is none of model, parallel, "):
        register_stage(replace(STAGES["rl"], name="haiku", sections=("modle",)))
    with pytest.raises(ValueError, match="stage haiku: entry='own_stage' must have the form module:function"):
        register_stage(replace(STAGES["rl"], name="haiku", entry="own_stage"))
    for name in ("", "two words"):
        with pytest.raises(ValueError, match=f"stage '{name}': its name must be one word"):
            register_stage(replace(STAGES["rl"], name=name))


def test_a_stage_without_sections_prints_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(STAGES, "haiku", replace(STAGES["pretrain"], name="haiku", sections=()))
    assert dry_run(load_config([]), 1, stage="haiku").startswith("Config (* differs from the default)\n\n")


@pytest.mark.parametrize("spec", STAGES.values(), ids=list(STAGES))
def test_an_entry_leads_to_a_function_of_its_module(spec):
    module, _, function = spec.entry.partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def names_a_stage(node: ast.AST) -> bool:
    """Does a comparison or match look at which stage it is?"""
    if isinstance(node, ast.Compare):
        words = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
        asked = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        asked |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        return bool(set(words) & set(STAGES)) and "stage" in asked
    return isinstance(node, ast.match_case) and any(
        isinstance(n, ast.Constant) and n.value in STAGES for n in ast.walk(node.pattern)
    )


def test_nothing_asks_which_stage_it_is():
    assert names_a_stage(ast.parse('self.stage != "rl"', mode="eval").body)
    assert names_a_stage(ast.parse('stage in ("rl", "sft")', mode="eval").body)
    paths = [*(ROOT / "megatron_ring").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    asking = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '')}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if names_a_stage(node)
    ]
    assert asking == []


OWN_STAGE = """
import sys
from dataclasses import replace
from pathlib import Path

from megatron_ring.config.stages import StageSpec, register_stage
from megatron_ring.errors import DataError

def tame(config, world_size):
    if config.train.lr > 1:
        yield f"lr={config.train.lr} is too much for haiku; try 1e-3"

def paper(config):
    if not Path(config.data.data_path[0]).exists():
        raise DataError(f"data_path={config.data.data_path[0]} does not exist; buy paper")

def haiku(config):
    print("written at", config.train.lr, "torch" in sys.modules)

register_stage(
    StageSpec(
        does="nothing yet",
        name="haiku",
        sections=("model", "train", "sft"),
        rules=(tame,),
        inputs=(paper,),
        entry="own_stage:haiku",
    )
)
"""


def test_a_stage_is_one_entry_and_one_file(tmp_path: Path):
    (tmp_path / "own_stage.py").write_text(OWN_STAGE)
    code = 'import own_stage\nfrom megatron_ring.launch.entry import run_stage\nrun_stage("haiku")\n'

    def run(*flags: str) -> tuple[int, str, str]:
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        command = [sys.executable, "-c", code, *flags]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    here = ("--data-path", str(tmp_path))
    assert run(*here, "--lr", "0.5") == (0, "written at 0.5 False\n", "")
    assert run(*here, "--lr", "2") == (2, "", "error: lr=2.0 is too much for haiku; try 1e-3\n")
    assert run("--data-path", "gone") == (2, "", "error: data_path=gone does not exist; buy paper\n")
    entry = "stage haiku: entry=own_stage:poem"
    (tmp_path / "own_stage.py").write_text(OWN_STAGE.replace("own_stage:haiku", "own_stage:poem"))
    assert run(*here) == (2, "", f"error: {entry}: module own_stage has no poem; correct the name\n")
    (tmp_path / "own_stage.py").write_text(
        OWN_STAGE.replace("own_stage:haiku", "own_stage:__doc__") + "__doc__ = ''\n"
    )
    said = "entry=own_stage:__doc__ is str, not a function; name one that takes the RunConfig"
    assert run(*here) == (2, "", f"error: stage haiku: {said}\n")
    (tmp_path / "own_stage.py").write_text(OWN_STAGE.replace("own_stage:haiku", "nowhere:haiku"))
    assert run(*here)[2].startswith("error: stage haiku: entry=nowhere:haiku: no module nowhere; install it")
    (tmp_path / "own_stage.py").write_text(OWN_STAGE.replace("own_stage:haiku", "a_script:haiku"))
    (tmp_path / "a_script.py").write_text("raise SystemExit(0)")
    said = "entry=a_script:haiku: the import of a_script ends with sys.exit(); call it in a function"
    assert run(*here) == (2, "", f"error: stage haiku: {said}\n")
    (tmp_path / "own_stage.py").write_text(OWN_STAGE)
    code_and_plan = run(*here, "--dry-run")
    assert code_and_plan[0] == 0 and "\nsft\n" in code_and_plan[1] and "\nrollout\n" not in code_and_plan[1]
