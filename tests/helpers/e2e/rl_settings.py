"""The settings of a tiny RL run."""

from __future__ import annotations

from pathlib import Path

STEPS = 4


def settings(corpus: dict[str, object], problems: Path, **more: object) -> dict[str, object]:
    """Everything that a resume has to keep is in use: interrupted and carried responses, a reference policy."""
    return {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "kv_channels": 32,
        "vocab_size": 512,
        "family": "bailing_moe",
        "norm_head": True,
        "num_experts": 4,
        "moe_ffn_hidden_size": 32,
        "moe_aux_loss_coeff": 1e-3,
        "max_position_embeddings": 128,
        "seq_length": 64,
        "bf16": False,
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "train_iters": STEPS,
        "tokenizer_model": str(corpus["tokenizer-model"]),
        "prompt_data": [str(problems)],
        "prompts_per_step": 6,
        "group_size": 4,
        "max_prompt_length": 40,
        "max_response_length": 24,
        "rollout_slots": 9,
        "rollout_token_budget": 300,
        "token_budget": 80,
        "minibatches_per_step": 2,
        "budget_overshoot": "carry",
        "microbatch_capacity": 128,
        "kl_loss_coef": 1e-2,
        "reward_functions": ["toy=tests.helpers.e2e.toy_reward:even"],
        "reward_workers": 1,
        "save_interval": 1,
        **more,
    }
