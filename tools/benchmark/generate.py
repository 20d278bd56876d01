#!/usr/bin/env python3
"""How fast rollouts are decoded on the training weights, beside plain torch kernels and transformers' generate.

    python tools/benchmark/generate.py                              with and without the C++ kernels
    python tools/benchmark/generate.py --peer-python PYTHON         and transformers, from that interpreter
    python tools/benchmark/generate.py --slots 32 --rounds 9        a smaller batch; more rounds

Each engine runs in its own process, with the same number of threads, and they take turns, round by round. All
have the same shapes, weights of the same size, prompts of the same lengths, and sample every response to its
full length at temperature 1; ours also returns log p of every token. Reported: tokens per second, the median
and the best of the rounds. On a GPU all run there, in bf16 (--no-bf16: fp32), and no C++ kernel is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmark import machine

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sizes = {"prompts": 16, "group": 8, "length": 64, "layers": 4, "hidden": 128, "experts": 8, "topk": 2}
    sizes |= {"ffn": 96, "vocab": 512, "slots": 128, "threads": 2, "rounds": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peer-python", help="an interpreter that has torch and transformers")
    parser.add_argument("--json", action="store_true")
    machine.add_bf16(parser)
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    return parser.parse_args()


def prompt_lengths(count: int) -> list[int]:
    return [4 + index % 3 for index in range(count)]


@contextmanager
def ours(a: argparse.Namespace) -> Iterator[tuple[Callable[[int], int], int]]:
    """``(generate, parameters)``; generate takes a seed and returns the tokens sampled."""
    import torch

    torch.set_num_threads(a.threads)
    from megatron_ring.config.check import validate
    from megatron_ring.config.load import config_from_mapping
    from megatron_ring.data.prompts.stream import Prompt
    from megatron_ring.rl.rollout.inprocess import InProcessEngine, Request, SamplingParams
    from megatron_ring.runtime.session import open_session
    from megatron_ring.train.engine import Engine

    config = config_from_mapping(
        {
            "family": "bailing_moe_v2",
            "num_layers": a.layers,
            "hidden_size": a.hidden,
            "ffn_hidden_size": 4 * a.hidden,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 64,
            "vocab_size": a.vocab,
            "qk_layernorm": True,
            "num_experts": a.experts,
            "moe_router_topk": a.topk,
            "moe_ffn_hidden_size": a.ffn,
            "moe_router_score_function": "softmax",
            "max_position_embeddings": 512,
            "bf16": a.bf16,
            "seq_length": 256,
            "micro_batch_size": 1,
            "global_batch_size": 1,
        }
    )
    validate(config, 1)
    requests = [
        Request(
            prompt=Prompt(uid=uid, domain="", text="", tokens=tuple(range(3, 3 + length)), reference={}),
            sample=sample,
        )
        for uid, length in enumerate(prompt_lengths(a.prompts))
        for sample in range(a.group)
    ]
    with open_session(config.parallel, seed=1) as session:
        engine = Engine(config, session)
        rollout = InProcessEngine(engine, slots=a.slots)

        def generate(seed: int) -> int:
            sampling = SamplingParams(max_response_length=a.length, seed=seed)
            return sum(response.length for response in rollout.generate(requests, sampling))

        yield generate, sum(p.numel() for model in engine.models for p in model.parameters())


@contextmanager
def peer(a: argparse.Namespace) -> Iterator[tuple[Callable[[int], int], int]]:
    """The same of transformers' Qwen3-MoE: one batch, padded on the left."""
    import torch

    torch.set_num_threads(a.threads)
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        intermediate_size=4 * a.hidden,
        moe_intermediate_size=a.ffn,
        num_hidden_layers=a.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=a.experts,
        num_experts_per_tok=a.topk,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    device = torch.device("cpu" if machine.device_name() == "cpu" else "cuda")
    dtype = torch.bfloat16 if a.bf16 else torch.float32
    model = Qwen3MoeForCausalLM(config).to(device, dtype).eval()
    lengths = [length for length in prompt_lengths(a.prompts) for _ in range(a.group)]
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, -length:] = torch.arange(3, 3 + length)
    tokens = tokens.to(device)

    def generate(seed: int) -> int:
        torch.manual_seed(seed)
        sampled = 0
        for start in range(0, len(lengths), a.slots):
            part = tokens[start : start + a.slots]
            out = model.generate(
                input_ids=part,
                attention_mask=(part > 0).long(),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=a.length,
                min_new_tokens=a.length,
            )
            sampled += (out.shape[1] - part.shape[1]) * len(part)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return sampled

    yield generate, sum(p.numel() for p in model.parameters())


def work(a: argparse.Namespace) -> None:
    """Answer each line of stdin with one round: tokens and seconds."""
    with (ours if a.worker == "ours" else peer)(a) as (generate, parameters):
        print(json.dumps({"parameters": parameters, "device": machine.device_name()}), flush=True)
        for seed, _line in enumerate(sys.stdin):
            start = time.perf_counter()
            tokens = generate(seed)
            print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - start}), flush=True)


def start(a: argparse.Namespace, python: str, worker: str, extension: str) -> subprocess.Popen[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(a).items() if type(value) is int]
    flags.append("--bf16" if a.bf16 else "--no-bf16")
    environment = {**os.environ, "MEGATRON_RING_EXT": extension, "OMP_NUM_THREADS": str(a.threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.Popen(
        [python, str(HERE), "--worker", worker, *flags],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> dict:
    """The worker's next line of JSON; other lines are a library's."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"a worker ended with code {process.wait()} before it answered; its errors are above")


def main() -> None:
    a = arguments()
    if a.worker:
        work(a)
        return
    a.bf16 = machine.wants_bf16(a.bf16)
    workers = {"ours": start(a, sys.executable, "ours", "1")}
    if machine.device_name() == "cpu":
        workers["ours, MEGATRON_RING_EXT=0"] = start(a, sys.executable, "ours", "0")
    if a.peer_python:
        workers["transformers generate"] = start(a, a.peer_python, "peer", "1")
    about = {name: answer(process) for name, process in workers.items()}
    machine.require_same_device({name: each["device"] for name, each in about.items()})
    rates: dict[str, list[float]] = {name: [] for name in workers}
    # the first round warms up
    for round_ in range(a.rounds + 1):
        for name, process in workers.items():
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            result = answer(process)
            assert result["tokens"] == a.prompts * a.group * a.length, f"{name}: {result}"
            if round_:
                rates[name].append(result["tokens"] / result["seconds"])
    for process in workers.values():
        process.communicate()
    rows = {
        name: {
            "parameters": about[name]["parameters"],
            "median_tokens_per_s": round(statistics.median(values)),
            "best_tokens_per_s": round(max(values)),
        }
        for name, values in rates.items()
    }
    if a.json:
        print(json.dumps(rows))
        return
    print(
        f"{a.prompts * a.group} sequences x {a.length} tokens on {machine.described(a.bf16)}, {a.threads} threads, "
        f"{a.rounds} rounds in turn"
    )
    for name, row in rows.items():
        ratio = rows["ours"]["median_tokens_per_s"] / row["median_tokens_per_s"]
        print(
            f"{name:28} {row['median_tokens_per_s']:7} tokens/s (best {row['best_tokens_per_s']:7})"
            f"   ours is {ratio:.2f} times as fast   {row['parameters']} parameters"
        )


if __name__ == "__main__":
    main()
