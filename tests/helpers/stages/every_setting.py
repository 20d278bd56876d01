"""Tiny runs of one or two steps for ``test_every_setting.py``: the company a choice needs, and what a run left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import Setting, settings
from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.data.corpus.writer import write_corpus
from megatron_ring.data.text.tokenizer_training import train_tokenizer
from megatron_ring.stages.pretrain import PretrainRun
from megatron_ring.stages.rl import RlRun
from megatron_ring.stages.run import open_stage
from megatron_ring.stages.sft import SftRun
from tests.helpers.model.small import weights
from tests.helpers.parallel.cases import MODELS

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOCK = ("seconds", "time", "tokens_per_second", "memory", "tflops", "mfu", "utilisation", "throughput")
"""What is in the names of the figures that no two runs share."""


@dataclass(frozen=True)
class Choice:
    """One value of one setting in one stage. Example: ``Choice("objective", "grpo", "rl")``."""

    name: str
    value: Any
    stage: str

    def __str__(self) -> str:
        shown = " ".join(self.value) if isinstance(self.value, tuple) else self.value
        return f"{self.stage}-{self.name}={shown}"


def values_of(setting: Setting) -> tuple[Any, ...]:
    """Every value of a setting that has a list of them; empty for numbers and text."""
    if setting.choices:
        return tuple((choice,) if setting.kind is tuple else choice for choice in setting.choices)
    return (False, True) if setting.kind is bool else ()


def every_choice(stages: dict[str, tuple[str, ...]]) -> list[Choice]:
    """Every choice of every setting; in pre-training unless the setting's section or ``stages`` says otherwise."""
    at_home: dict[str, str] = {
        "sft": "sft",
        **dict.fromkeys(("rollout", "budget", "objective", "reward"), "rl"),
    }
    return [
        Choice(name, value, stage)
        for name, setting in settings().items()
        for value in values_of(setting)
        for stage in stages.get(name, (at_home.get(setting.section, "pretrain"),))
    ]


def make_inputs(folder: Path) -> dict[str, Any]:
    """Two tokenizers, a corpus of short documents, conversations and problems, by the flat names that read them."""
    train_tokenizer(builtin_documents(0.1), folder / "tok.model", vocab_size=400)
    _byte_level(folder / "huggingface")
    with write_corpus(str(folder / "counting"), vocab_size=250, manifest={}) as writer:
        for start in range(60):
            writer.add((np.arange(11 + start % 7) + 7 * start) % 240)
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{i}+1"},
                {"role": "assistant", "content": "yes" * (1 + i % 4)},
            ]
        }
        for i in range(24)
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [{"prompt": f"f{i}(x):", "domain": "toy", "answer": str(i)} for i in range(40)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "tokenizer_model": str(folder / "tok.model"),
        "data_path": (str(folder / "counting"),),
        "sft_data": (str(folder / "chat.jsonl"),),
        "prompt_data": (str(folder / "problems.jsonl"),),
    }


def _byte_level(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def base(stage: str) -> dict[str, Any]:
    """A model of two layers with experts, and two steps."""
    common = {
        **MODELS["v1"],
        "num_layers": 2,
        "vocab_size": 400,
        "max_position_embeddings": 128,
        "seq_length": 32,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "train_iters": 2,
        "lr": 2e-3,
        "min_lr": 1e-4,
        "log_level": "error",
        "split": "80,20,0",
    }
    rollouts = {
        "prompts_per_step": 6,
        "group_size": 4,
        "max_prompt_length": 40,
        "max_response_length": 24,
        "rollout_slots": 9,
        "token_budget": 80,
        "minibatches_per_step": 2,
        "microbatch_capacity": 128,
        "kl_loss_coef": 0.0,
        "reward_functions": ("toy=tests.helpers.e2e.toy_reward:even",),
        "reward_workers": 1,
    }
    return {**common, **rollouts} if stage == "rl" else common


def configure(stage: str, inputs: dict[str, Any], run_dir: Path, chosen: dict[str, Any]) -> RunConfig:
    """The base of ``stage`` with ``chosen`` on top; ``{run}`` in a value is the run's folder.

    Raises:
        ConfigError: it breaks a rule.
    """
    folder = Path(inputs["tokenizer_model"]).parent
    read = {"pretrain": "data_path", "sft": "sft_data", "rl": "prompt_data"}[stage]
    used = {read: inputs[read]} | (
        {} if stage == "pretrain" else {"tokenizer_model": inputs["tokenizer_model"]}
    )
    words = {
        name: value.format(run=run_dir, inputs=folder) if isinstance(value, str) else value
        for name, value in chosen.items()
    }
    where = {"metrics_file": str(run_dir / "metrics.jsonl")}
    config = config_from_mapping({**base(stage), **used, **where, **words})
    validate(config, 1, stage)
    return config


def outcome(stage: str, config: RunConfig) -> dict[str, Any]:
    """Run ``stage`` to its end: its figures without the clock's, its final weights, the files it left."""
    run_dir = Path(config.logging.metrics_file or "").parent
    with open_stage(config) as session:
        if stage == "pretrain":
            run = PretrainRun(config, session)
        else:
            run = SftRun.of(config, session) if stage == "sft" else RlRun(config, session)
        run.run()
        final = {name: value.double().sum().item() for name, value in weights(run.engine).items()}
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figures = [
        {name: value for name, value in record.items() if not any(word in name for word in CLOCK)}
        for record in records
    ]
    assert sum(record["kind"] == "train" for record in records) >= 1
    assert all(np.isfinite(value) for value in final.values())
    files = sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*"))
    return {"figures": figures, "weights": final, "files": files}
