#!/usr/bin/env python3
"""A C3PO step end to end beside TRL's GRPOTrainer: sample, verify, train. Same parameter count, prompts, forced
lengths.

    python tools/benchmark/rl_step.py                               ours alone
    python tools/benchmark/rl_step.py --peer-python PYTHON          and TRL, from an interpreter that has it
    python tools/benchmark/rl_step.py --bf16 --peer-python PYTHON   both in bf16, as they are on a GPU anyway

Each runs in its own process with the same number of threads, and they take turns, step by step. No KL, no
recomputed log p on either side; every sampled token is trained on (the budget is all of them).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmark import machine

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"prompts": 16, "group": 8, "length": 64, "layers": 4, "hidden": 128, "experts": 8, "topk": 2}
    sizes |= {"ffn": 96, "vocab": 512, "threads": 2, "rounds": 6}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    machine.add_bf16(parser)
    parser.add_argument("--peer-python", help="an interpreter that has torch, transformers and trl")
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    return parser.parse_args()


def wait_for_turn() -> None:
    if not sys.stdin.readline():
        sys.exit(0)


def answer(**values: object) -> None:
    print(json.dumps(values), flush=True)


def ours(a: argparse.Namespace, folder: Path) -> None:
    """Steps of the RL stage itself, one for each line on stdin."""
    sys.path.insert(0, str(folder))
    import contextlib

    import torch

    from megatron_ring.config.load import config_from_mapping
    from megatron_ring.data.text.tokenizer_training import train_tokenizer
    from megatron_ring.observe.metrics import MetricsLogger
    from megatron_ring.runtime.device import synchronize
    from megatron_ring.runtime.session import open_session
    from megatron_ring.stages.rl import RlRun
    from tools.gpu.toy import REWARD, write_problems

    torch.set_num_threads(a.threads)
    (folder / "bench_reward.py").write_text(REWARD)
    os.environ["PYTHONPATH"] = f"{folder}:{ROOT}"
    # digits are split, so it takes letters to fill a vocabulary
    words = ["".join(chr(97 + (i * step >> 3) % 26) for step in (1, 3, 7, 11, 17)) for i in range(4000)]
    train_tokenizer(iter(words), folder / "tok.model", vocab_size=a.vocab)
    write_problems(folder / "problems.jsonl", 4096)
    tokens = a.prompts * a.group * a.length
    values = {
        "family": "bailing_moe", "num_layers": a.layers, "hidden_size": a.hidden, "num_attention_heads": 4,
        "num_query_groups": 2, "kv_channels": 64, "vocab_size": a.vocab, "qk_layernorm": True,
        "num_experts": a.experts, "moe_router_topk": a.topk, "moe_ffn_hidden_size": a.ffn, "bf16": a.bf16,
        "max_position_embeddings": 512, "seq_length": 64, "lr": 1e-4, "lr_decay_style": "constant",
        "train_iters": 10_000, "tokenizer_model": str(folder / "tok.model"),
        "prompt_data": (str(folder / "problems.jsonl"),), "prompts_per_step": a.prompts,
        "group_size": a.group, "max_prompt_length": 8, "max_response_length": a.length,
        "rollout_slots": a.prompts * a.group, "token_budget": tokens, "minibatches_per_step": 1,
        "microbatch_capacity": 3600, "kl_loss_coef": 0.0, "entropy_coef": 0.0, "old_logprobs": "current",
        "reward_functions": ("bench=bench_reward:judge",), "reward_workers": 1, "log_level": "error",
    }  # fmt: skip
    config = config_from_mapping(values)
    with open_session(config.parallel, 0) as session, contextlib.ExitStack() as stack:
        run = stack.enter_context(RlRun(config, session).opened())
        # no token ends a response: every one is of the same length
        run.collector.sampling = forced(run.sampling)
        count = sum(p.numel() for model in run.engine.models for p in model.parameters())
        metrics = MetricsLogger(None, total_steps=10_000, log_interval=10_000, is_log_rank=False)
        answer(parameters=count, device=machine.device_name())
        while True:
            wait_for_turn()
            begun = time.perf_counter()
            run.train_step(metrics)
            synchronize()
            answer(seconds=time.perf_counter() - begun, tokens=tokens)


def forced(sampling):
    from dataclasses import replace

    return replace(sampling, stop_ids=())


def peer(a: argparse.Namespace, folder: Path) -> None:
    """TRL's trainer, held at the beginning of each step until a line comes on stdin."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(a.threads)
    names = ["<pad>", "<eos>", "<unk>", *(chr(c) for c in range(32, 127))]
    vocab = {name: index for index, name in enumerate(names)}
    vocab |= {f"<x{index}>": index for index in range(len(names), a.vocab)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **special)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=4 * a.hidden, head_dim=64,
            moe_intermediate_size=a.ffn, num_hidden_layers=a.layers, num_attention_heads=4,
            num_key_value_heads=2, num_experts=a.experts, num_experts_per_tok=a.topk, norm_topk_prob=True,
            mlp_only_layers=[], max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0,
            eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    model = model.bfloat16() if a.bf16 else model.float()
    on_cpu = machine.device_name() == "cpu"
    rows = [{"prompt": f"{i}+{i * 7 % 13}="} for i in range(4096)]

    class Turns(TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs):
            wait_for_turn()
            self.begun = time.perf_counter()

        def on_step_end(self, *_args, **_kwargs):
            if not on_cpu:
                torch.cuda.synchronize()
            answer(seconds=time.perf_counter() - self.begun, tokens=a.prompts * a.group * a.length)

    settings = GRPOConfig(
        output_dir=str(folder), use_cpu=on_cpu, bf16=a.bf16, per_device_train_batch_size=a.prompts * a.group,
        num_generations=a.group, max_completion_length=a.length, max_steps=10_000, learning_rate=1e-4, beta=0.0,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, loss_type="dapo",
        temperature=1.0, generation_kwargs={"min_new_tokens": a.length},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        args=settings,
        reward_funcs=lambda completions, **_: [float(len(text) % 2) for text in completions],
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    answer(parameters=sum(p.numel() for p in model.parameters()), device=machine.device_name())
    trainer.train()


class Worker:
    """One engine in its own process, which makes a step on request."""

    def __init__(self, python: str, kind: str, words: list[str]):
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [python, str(HERE), "--worker", kind, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        about = self._read()
        self.parameters, self.device = about["parameters"], about["device"]

    def step(self) -> float:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()["seconds"]

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a worker ended; run it by hand with --worker to see why")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    a = arguments()
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    if a.worker:
        with tempfile.TemporaryDirectory() as folder:
            (ours if a.worker == "ours" else peer)(a, Path(folder))
        return
    bf16 = machine.wants_bf16(a.bf16)
    words = [f"--{name}={value}" for name, value in vars(a).items() if type(value) is int]
    words.append("--bf16" if bf16 else "--no-bf16")
    workers = {"megatron_ring": Worker(sys.executable, "ours", words)}
    if a.peer_python:
        workers["TRL"] = Worker(a.peer_python, "peer", words)
    times: dict[str, list[float]] = {name: [] for name in workers}
    try:
        machine.require_same_device({name: worker.device for name, worker in workers.items()})
        for turn in range(a.rounds + 1):
            for name, worker in workers.items():
                seconds = worker.step()
                if turn:
                    times[name].append(seconds)
    finally:
        for worker in workers.values():
            worker.close()
    tokens = a.prompts * a.group * a.length
    print(f"{a.prompts * a.group} responses of {a.length} tokens on {machine.described(bf16)}")
    for name, taken in times.items():
        median = statistics.median(taken)
        size = workers[name].parameters / 1e6
        print(
            f"{name:14} {size:.2f}M parameters, {median:.3f} s a step (best {min(taken):.3f}), {tokens / median:,.0f} tok/s"
        )
    if "TRL" in times:
        ratios = [theirs / mine for mine, theirs in zip(times["megatron_ring"], times["TRL"], strict=True)]
        print(
            f"TRL / megatron_ring: {statistics.median(ratios):.2f} in the median round "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
