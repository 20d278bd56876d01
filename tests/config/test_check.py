"""Each wrong configuration gives one line that names value, rule and remedy."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ring.config import inputs
from megatron_ring.config.check import check_inputs, validate
from megatron_ring.config.load import load_config, preset_config
from megatron_ring.config.presets import PRESETS
from megatron_ring.config.settings import sections, settings, value_problems
from megatron_ring.errors import CheckpointError, ConfigError, DataError
from megatron_ring.families import FAMILIES

# preset, flags, processes, the whole line
WRONG = [
    (
        "ring_lite",
        "--distributed-timeout-minutes 99999999999999999999999",
        1,
        "distributed_timeout_minutes=99999999999999999999999 must be at most 525600; that is a year",
    ),
    (
        "ring_lite",
        "--expert-model-parallel-size 6",
        6,
        "expert_model_parallel_size=6 must divide num_experts=64; try 4 or 8",
    ),
    (
        "ring_lite",
        "--tensor-model-parallel-size 3 --sequence-parallel",
        3,
        "tensor_model_parallel_size=3 must divide num_attention_heads=16; try 2 or 4",
    ),
    (
        "ring_lite",
        "--tensor-model-parallel-size 8 --sequence-parallel",
        8,
        "tensor_model_parallel_size=8 must divide num_query_groups=4; try 4",
    ),
    (
        "qwen2_7b",
        "--tensor-model-parallel-size 4 --ffn-hidden-size 18946",
        4,
        "tensor_model_parallel_size=4 must divide ffn_hidden_size=18946; try 2",
    ),
    (
        "ring_lite",
        "--tensor-model-parallel-size 2",
        2,
        "sequence_parallel=False with tensor_model_parallel_size=2 and num_experts=64: experts need it; "
        "add --sequence-parallel",
    ),
    (
        "ring_lite",
        "--sequence-parallel",
        1,
        "sequence_parallel=True needs tensor_model_parallel_size > 1; "
        "add --no-sequence-parallel or raise tensor_model_parallel_size",
    ),
    (
        "ring_lite",
        "--expert-tensor-parallel-size 3",
        3,
        "expert_tensor_parallel_size=3 must divide moe_ffn_hidden_size=1408; try 2 or 4",
    ),
    (
        "qwen2_tiny",
        "--expert-model-parallel-size 2",
        2,
        "expert_model_parallel_size=2 needs num_experts > 0; set it to 1 in a dense model",
    ),
    (
        "ring_lite",
        "--pipeline-model-parallel-size 3",
        3,
        "num_layers=28 must be a multiple of pipeline_model_parallel_size=3; try 2 or 4 stages",
    ),
    (
        "ring_lite",
        "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2",
        4,
        "num_layers=28 must be a multiple of pipeline_model_parallel_size*"
        "num_virtual_stages_per_pipeline_rank=4*2=8; try 7 or 14 stages",
    ),
    (
        "ring_lite",
        "--num-virtual-stages-per-pipeline-rank 2",
        1,
        "num_virtual_stages_per_pipeline_rank=2 needs pipeline_model_parallel_size > 1; "
        "set it to 1 without a pipeline",
    ),
    (
        "ring_lite_tiny",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 12",
        2,
        "global_batch_size=12 gives 3 microbatches per rank, which must be a multiple of "
        "pipeline_model_parallel_size=2 with virtual stages; try 8 or 16",
    ),
    (
        "ring_lite",
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
        6,
        "world_size=6 must be a multiple of tensor_model_parallel_size*pipeline_model_parallel_size=2*2=4; "
        "start 4 or 8 processes",
    ),
    (
        "ring_lite",
        "--expert-model-parallel-size 4 --expert-tensor-parallel-size 2",
        4,
        "world_size=4 must be a multiple of expert_tensor_parallel_size*expert_model_parallel_size*"
        "pipeline_model_parallel_size=2*4*1=8; start 8 processes",
    ),
    (
        "ring_lite",
        "--context-parallel-size 2",
        2,
        "context_parallel_size=2 is not supported; set it to 1 and shard by tp or pp",
    ),
    ("ring_lite", "--fp8 e4m3", 1, "fp8=e4m3 is not supported; drop --fp8 and use --bf16"),
    (
        "ring_lite_tiny",
        "--recompute-granularity selective --recompute-modules core_attn mlp",
        1,
        "recompute_modules=core_attn mlp: mlp needs a layer without experts, which the model does not have; "
        "drop mlp",
    ),
    (
        "qwen2_tiny",
        "--recompute-granularity selective --recompute-modules moe",
        1,
        "recompute_modules=moe: moe needs num_experts > 0, which the model does not have; drop moe",
    ),
    (
        "qwen2_tiny",
        "--recompute-granularity selective --recompute-modules shared_experts layernorm",
        1,
        "recompute_modules=shared_experts layernorm: shared_experts needs "
        "moe_shared_expert_intermediate_size > 0, which the model does not have; drop shared_experts",
    ),
    (
        "ring_lite",
        "--overlap-param-gather",
        1,
        "overlap_param_gather=True needs overlap_grad_reduce; add --overlap-grad-reduce",
    ),
    (
        "ring_lite",
        "--overlap-param-gather --overlap-grad-reduce --no-use-distributed-optimizer",
        1,
        "overlap_param_gather=True needs use_distributed_optimizer; add --use-distributed-optimizer",
    ),
    (
        "ring_lite_tiny",
        "--global-batch-size 18",
        1,
        "global_batch_size=18 must be a multiple of micro_batch_size*data_parallel_size=4*1=4; try 16 or 20",
    ),
    (
        "ring_lite_tiny",
        "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 1 --seq-length 255",
        2,
        "micro_batch_size*seq_length=1*255=255 must be a multiple of tensor_model_parallel_size=2; "
        "try seq_length=254 or 256",
    ),
    (
        "ring_lite_tiny",
        "--seq-length 8192",
        1,
        "seq_length=8192 must be at most max_position_embeddings=4096; "
        "shorten it or set --max-position-embeddings",
    ),
    (
        "ring_lite_tiny",
        "--micro-batch-size 0",
        1,
        "micro_batch_size=0 must be at least 1; set --micro-batch-size",
    ),
    ("ring_lite", "--moe-router-topk 65", 1, "moe_router_topk=65 must be from 1 to num_experts=64; try 2"),
    ("ring_lite", "--moe-router-topk 0", 1, "moe_router_topk=0 must be at least 1; try 2"),
    ("ring_lite", "--num-experts 1", 1, "moe_router_topk=6 must be from 1 to num_experts=1; try 1"),
    (
        "ring_lite",
        "--num-query-groups 5",
        1,
        "num_query_groups=5 must divide num_attention_heads=16; try 4 or 8",
    ),
    (
        "ring_mini_v2",
        "--moe-router-num-groups 7",
        1,
        "moe_router_num_groups=7 must divide num_experts=256; try 4 or 8",
    ),
    (
        "ring_mini_v2",
        "--moe-router-group-topk 9",
        1,
        "moe_router_group_topk=9 must be from 1 to moe_router_num_groups=8; try 4",
    ),
    (
        "ring_mini_v2",
        "--moe-router-num-groups 256 --moe-router-group-topk 8",
        1,
        "moe_router_num_groups=256 leaves 1 expert per group, but a group is scored by its best 2; "
        "try at most 128",
    ),
    (
        "ring_mini_v2",
        "--moe-router-num-groups 64 --moe-router-group-topk 1",
        1,
        "moe_router_group_topk=1 leaves 4 experts to choose from, below moe_router_topk=8; "
        "try moe_router_group_topk=2",
    ),
    (
        "ring_lite",
        "--moe-router-enable-expert-bias",
        1,
        "moe_router_enable_expert_bias=True needs moe_router_score_function=sigmoid, not softmax; choose one",
    ),
    (
        "ring_lite",
        "--mtp-num-layers 1",
        1,
        "mtp_num_layers=1 needs family=bailing_moe_v2, not bailing_moe; set --mtp-num-layers 0",
    ),
    (
        "ring_lite",
        "--num-experts 0",
        1,
        "num_experts=0 does not fit family=bailing_moe, which has experts; try --num-experts 8",
    ),
    (
        "qwen2_tiny",
        "--num-experts 8",
        1,
        "num_experts=8 must be 0 for family=qwen2, which is dense; "
        f"choose --family {' or '.join(f.name for f in FAMILIES.values() if f.has_experts)}",
    ),
    (
        "ring_mini_v2",
        "--first-k-dense-replace 20",
        1,
        "first_k_dense_replace=20 must be below num_layers=20; for a dense model set --num-experts 0",
    ),
    (
        "ring_mini_v2",
        "--kv-channels 34",
        1,
        "kv_channels=34 times rotary_percent=0.5 must be an even number of rotated channels; "
        "try kv_channels=32 or 64",
    ),
    ("ring_lite_tiny", "--lr 0", 1, "lr=0.0 must be positive; try 3e-4"),
    ("ring_lite_tiny", "--lr nan", 1, "lr=nan must be finite; set --lr"),
    (
        "ring_lite_tiny",
        f"--vocab-size {1 << 62}",
        1,
        f"vocab_size={1 << 62} must be at most 16777216; set --vocab-size",
    ),
    (
        "ring_lite_tiny",
        f"--num-layers {1 << 62}",
        1,
        f"num_layers={1 << 62} must be at most 16384; set --num-layers",
    ),
    ("ring_lite_tiny", "--min-lr 1", 1, "min_lr=1.0 must be from 0 to lr=0.002; try 0.0002"),
    (
        "ring_lite_tiny",
        "--lr-warmup-iters 100",
        1,
        "lr_warmup_iters=100 must be from 0 to below train_iters=100; try 1",
    ),
    (
        "ring_lite_tiny",
        "--lr-decay-style WSD",
        1,
        "lr_decay_style=WSD needs lr_wsd_decay_iters; try --lr-wsd-decay-iters 10",
    ),
    (
        "ring_lite_tiny",
        "--lr-decay-style WSD --lr-warmup-iters 60 --lr-wsd-decay-iters 50",
        1,
        "lr_warmup_iters+lr_wsd_decay_iters=110 must be at most train_iters=100; shorten one of them",
    ),
    (
        "ring_lite_tiny",
        "--rampup-batch-size 8 5 100",
        1,
        "rampup_batch_size=8 5 100: increment 5 must be a multiple of micro_batch_size*data_parallel_size=4; "
        "try 4 or 8",
    ),
    (
        "ring_lite_tiny",
        "--rampup-batch-size 4 8 100",
        1,
        "rampup_batch_size=4 8 100: increment must divide global_batch_size-start=12; try increment 4",
    ),
    (
        "ring_lite_tiny",
        "--rampup-batch-size 32 4 100",
        1,
        "rampup_batch_size=32 4 100: start must be at most global_batch_size=16; try 4",
    ),
    (
        "ring_lite_tiny",
        "--rampup-batch-size 4 4 100 --pipeline-model-parallel-size 2 "
        "--num-virtual-stages-per-pipeline-rank 2",
        2,
        "batch size 4 of rampup_batch_size gives 1 microbatches per rank, which must be a multiple of "
        "pipeline_model_parallel_size=2 with virtual stages; try 8",
    ),
    (
        "ring_lite_tiny",
        "--loss-spike-factor 0.5",
        1,
        "loss_spike_factor=0.5 must be 0 (off) or above 1; try 1.5",
    ),
    (
        "ring_lite_tiny",
        "--split 90,10",
        1,
        "split=90,10 must be three shares, the first above 0; try 949,50,1",
    ),
    (
        "ring_lite_tiny",
        "--split 1,0,0 --eval-interval 10",
        1,
        "split=1,0,0 leaves nothing to validate on, but eval_interval=10; try 949,50,1",
    ),
    (
        "ring_lite_tiny",
        "--data-path 0.3 a 0.7",
        1,
        "data_path has 3 words, but a blend is pairs; write weight prefix weight prefix",
    ),
    (
        "ring_lite_tiny",
        "--chat-template-kwargs {}",
        1,
        "chat_template_kwargs is for conversations; drop --chat-template-kwargs in pre-training",
    ),
    (
        "ring_lite_tiny",
        "--data-path a 0.3 b 0.7",
        1,
        "data_path weight a must be a positive number; write weight prefix weight prefix",
    ),
    (
        "ring_lite_tiny",
        "--save-interval 10",
        1,
        "save_interval=10 needs a folder to save in; set --save FOLDER",
    ),
    ("ring_lite_tiny", "--async-save", 1, "async_save=True needs a folder to save in; set --save FOLDER"),
    ("ring_lite_tiny", "--finetune", 1, "finetune=True needs a checkpoint to load; set --load FOLDER"),
    (
        "ring_lite_tiny",
        "--profile --profile-step-start 5 --profile-step-end 5",
        1,
        "profile_step_start=5 must be from 0 to below profile_step_end=5; try 5 and 7",
    ),
    ("ring_lite_tiny", "--hidden-size -1", 1, "hidden_size=-1 must be positive; set --hidden-size"),
]


@pytest.mark.parametrize(
    ("preset", "flags", "world_size", "line"), WRONG, ids=[f"{w[0]} {w[1]}"[:70] for w in WRONG]
)
def test_a_wrong_configuration_is_one_exact_line(preset: str, flags: str, world_size: int, line: str):
    config = load_config(["--preset", preset, *flags.split()])
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size)
    assert str(caught.value) == line


@pytest.mark.parametrize("name", ["save", "load", "pretrained_checkpoint", "metrics_file", "tokenizer_model"])
def test_a_name_that_is_empty_is_no_name(name: str, tmp_path: Path):
    """``--save "$UNSET"`` would train without saving."""
    flag = "--" + name.replace("_", "-")
    (tmp_path / "run.toml").write_text(f'{name} = ""\n')
    for words in ([flag, ""], ["--config", str(tmp_path / "run.toml")]):
        with pytest.raises(ConfigError) as caught:
            validate(load_config(["--preset", "ring_lite_tiny", *words]), 1)
        assert str(caught.value) == f"{name}='' is empty; write none, or a value for {flag}"


@pytest.mark.parametrize("key", ["save", "data_path"])
def test_a_null_character_is_one_line(key: str, tmp_path: Path):
    (tmp_path / "run.toml").write_text(f"{key} = {'[%s]' if key == 'data_path' else '%s'}\n" % '"a\\u0000b"')
    with pytest.raises(ConfigError) as caught:
        validate(load_config(["--preset", "ring_lite_tiny", "--config", str(tmp_path / "run.toml")]), 1)
    shown = repr(("a\0b",) if key == "data_path" else "a\0b")
    said = f"{key}={shown} holds a null character, which no file's name may; set --{key.replace('_', '-')}"
    assert str(caught.value) == said


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_on_one_process(preset: str):
    validate(preset_config(preset), 1)


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("", 1),
        ("--preset ring_lite --tensor-model-parallel-size 4 --sequence-parallel", 4),
        ("--preset ring_lite --expert-model-parallel-size 8", 8),
        ("--preset ring_lite_tiny --expert-tensor-parallel-size 2 --expert-model-parallel-size 2", 4),
        (
            "--preset ring_mini_v2_tiny --mtp-num-layers 1 --tensor-model-parallel-size 2 "
            "--sequence-parallel --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
            "--micro-batch-size 1 --expert-model-parallel-size 2",
            8,
        ),
        ("--preset ring_lite_tiny --rampup-batch-size 4 4 100", 1),
        ("--preset ring_lite_tiny --lr-decay-style WSD --lr-warmup-iters 10 --lr-wsd-decay-iters 90", 1),
    ],
)
def test_good_layouts_pass(flags: str, world_size: int):
    validate(load_config(flags.split()), world_size)


def test_a_wrong_type_or_choice_set_in_code_is_refused():
    from dataclasses import replace

    config = preset_config("ring_lite_tiny")
    for change, line in (
        ({"num_layers": 4.0}, "num_layers=4.0 must be an integer; set --num-layers"),
        ({"num_layers": True}, "num_layers=True must be an integer; set --num-layers"),
        (
            {"moe_router_dtype": "bf16"},
            "moe_router_dtype='bf16' must be one of fp32, fp64; set --moe-router-dtype",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            validate(replace(config, model=replace(config.model, **change)), 1)
        assert str(caught.value) == line


def test_missing_inputs_are_one_line(tmp_path: Path):
    def refused(flags: list[str], error: type[Exception]) -> str:
        with pytest.raises(error) as caught:
            check_inputs(load_config(["--preset", "ring_lite_tiny", *flags]))
        return str(caught.value)

    corpus = tmp_path / "corpus"
    assert refused([], DataError).startswith("data_path is empty, training needs a corpus; set --data-path")
    assert f"{corpus}.idx does not exist" in refused(["--data-path", str(corpus)], DataError)
    (tmp_path / "corpus.idx").touch()
    assert f"{corpus}.bin does not exist" in refused(["--data-path", str(corpus)], DataError)
    (tmp_path / "corpus.bin").touch()
    good = ["--data-path", str(corpus)]
    check_inputs(load_config(["--preset", "ring_lite_tiny", *good]))
    no_tokenizer = refused([*good, "--tokenizer-model", str(tmp_path / "t.model")], DataError)
    assert (
        no_tokenizer
        == f"tokenizer_model={tmp_path}/t.model does not exist; name the tokenizer's file or folder"
    )
    gone = str(tmp_path / "gone")
    assert refused([*good, "--load", gone], CheckpointError).startswith(f"load={gone} is not a folder")


def test_loading_from_the_folder_that_is_saved_to_may_start_empty(tmp_path: Path):
    for suffix in (".idx", ".bin"):
        (tmp_path / f"c{suffix}").touch()
    where = str(tmp_path / "checkpoints")
    check_inputs(load_config(["--data-path", str(tmp_path / "c"), "--save", where, "--load", where]))


@pytest.mark.parametrize("name", [s.name for s in settings().values() if s.kind is tuple and s.item is str])
@pytest.mark.parametrize("words", [("",), ("1", "")])
def test_an_empty_word_of_a_list_is_refused(name: str, words: tuple[str, ...]):
    (problem,) = value_problems(replace(sections()[settings()[name].section](), **{name: words}))
    if settings()[name].choices:
        assert problem.startswith(f"{name}={words!r} must be a list from ")
    else:
        assert problem == f"{name}={list(words)} has an empty word; name what was meant, or leave it out"


def test_a_metrics_file_that_is_a_folder_is_refused_before_it_is_renamed(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        check_inputs(load_config(["--metrics-file", str(tmp_path)]))
    assert (
        str(caught.value)
        == f"metrics_file={tmp_path} is a folder; name a file, such as {tmp_path}/metrics.jsonl"
    )


def test_a_metrics_file_that_is_a_pipe_or_a_device_is_refused_before_it_is_renamed(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(ConfigError) as caught:
            check_inputs(load_config(["--metrics-file", str(tmp_path / name)]))
        assert (
            str(caught.value)
            == f"metrics_file={tmp_path}/{name} is no plain file; name a file, or drop --metrics-file"
        )


def test_wandb_without_its_package_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_inputs(load_config(["--wandb-project", "ring"]))
    assert str(caught.value) == "wandb_project=ring needs wandb; pip install wandb or drop --wandb-project"
