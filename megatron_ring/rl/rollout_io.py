"""Rollouts as bytes: what crosses processes and what a checkpoint keeps. Safetensors, so nothing is unpickled.

Layout: the arrays of all rollouts end to end, and one JSON list beside them that says where each begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from megatron_ring.data.json_text import count_in, counts_in
from megatron_ring.data.prompts.same_problem import asked
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import CheckpointError
from megatron_ring.rl.types import Response, RewardResult, Rollout

_LEARNT = ("advantages", "values", "returns")
"""Rows of a rollout that are there once advantages are assigned, or with a critic."""

_UNJUDGED = RewardResult(score=0.0, status="wrong", detail="not judged yet")


def rollouts_to_bytes(rollouts: Sequence[Rollout]) -> bytes:
    """Everything of ``rollouts``, bit for bit, in their order."""
    entries = [_entry(rollout) for rollout in rollouts]
    responses = [rollout.response for rollout in rollouts]
    arrays = {
        "tokens": _joined((r.tokens_R for r in responses), np.int32),
        "logprobs": _joined((r.logprobs_R for r in responses), np.float32),
        "versions": _joined((r.versions_R for r in responses), np.int32),
        **{
            name: _joined((row for r in rollouts if (row := getattr(r, f"{name}_R")) is not None), np.float32)
            for name in _LEARNT
        },
        "routes": _joined(
            (r.routes_SLK.reshape(-1) for r in responses if r.routes_SLK is not None), np.int16
        ),
    }
    # escaped: texts of others may hold half a surrogate pair, which has no UTF-8
    arrays["entries"] = np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8)
    return save(arrays)


def rollouts_from_bytes(data: bytes) -> list[Rollout]:
    """Undo :func:`rollouts_to_bytes`.

    Raises:
        CheckpointError: the bytes are none of ours, or cut short.
    """
    try:
        arrays = load(data)
        return _rollouts(arrays, json.loads(arrays["entries"].tobytes().decode()))
    except Exception as error:
        raise CheckpointError(
            f"saved rollouts cannot be read ({error}); load an earlier checkpoint"
        ) from None


def _rollouts(arrays: Mapping[str, np.ndarray], entries: list[dict[str, Any]]) -> list[Rollout]:
    places = dict.fromkeys(("tokens", "logprobs", "versions", "routes", *_LEARNT), 0)

    def take(name: str, count: int) -> np.ndarray:
        start = places[name]
        places[name] = start + count
        part = arrays[name][start : start + count]
        if len(part) != count:
            raise ValueError(f"{name} are cut short")
        return part

    return [_rollout(entry, take) for entry in entries]


def responses_to_bytes(prompts: Mapping[int, Prompt], responses: Iterable[Response]) -> bytes:
    """Responses that have no reward yet, with their prompts."""
    unjudged = [Rollout(prompt=prompts[r.prompt_uid], response=r, reward=_UNJUDGED) for r in responses]
    return rollouts_to_bytes(unjudged)


def prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    return {
        "uid": prompt.uid,
        "domain": prompt.domain,
        "text": prompt.text,
        "tokens": list(prompt.tokens),
        "reference": dict(prompt.reference),
        "asked": list(prompt.asked),
    }


def prompt_from_json(values: Mapping[str, Any]) -> Prompt:
    # older checkpoints have the last turn alone
    own = values["asked"] if "asked" in values else asked([values["text"]])
    texts = (values["domain"], values["text"], *own)
    if not all(isinstance(text, str) for text in texts) or not isinstance(values["reference"], dict):
        raise ValueError("a prompt has a text that is none")
    count_in(values, "uid")
    counts_in(values, "tokens")
    return Prompt(**{**values, "tokens": tuple(values["tokens"]), "asked": tuple(own)})


def _joined(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    parts = [np.asarray(array, dtype=dtype) for array in arrays]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _entry(rollout: Rollout) -> dict[str, Any]:
    response, reward = rollout.response, rollout.reward
    return {
        "prompt": prompt_to_json(rollout.prompt),
        "sample": response.sample,
        "length": response.length,
        "stop": response.stop,
        "score": reward.score,
        "status": reward.status,
        "detail": reward.detail,
        "arrival": list(rollout.arrival),
        "has": [name for name in _LEARNT if getattr(rollout, f"{name}_R") is not None],
        "routes": None if response.routes_SLK is None else list(response.routes_SLK.shape),
    }


def _rollout(entry: dict[str, Any], take) -> Rollout:
    prompt, length = prompt_from_json(entry["prompt"]), count_in(entry, "length")
    score, said = entry["score"], (entry["stop"], entry["status"], entry["detail"])
    if type(score) not in (int, float) or not all(isinstance(word, str) for word in said):
        raise ValueError("a response has no score or verdict")
    version, rounds, new = counts_in(entry, "arrival")
    if not isinstance(entry["has"], list) or not set(entry["has"]) <= set(_LEARNT):
        raise ValueError("a response has rows that are unknown")
    response = Response(
        prompt_uid=prompt.uid,
        sample=count_in(entry, "sample"),
        tokens_R=take("tokens", length),
        logprobs_R=take("logprobs", length),
        versions_R=take("versions", length),
        stop=entry["stop"],
    )
    if entry["routes"] is not None:
        shape = tuple(counts_in(entry, "routes"))
        response = replace(response, routes_SLK=take("routes", int(np.prod(shape))).reshape(shape))
    return Rollout(
        prompt=prompt,
        response=response,
        reward=RewardResult(score=entry["score"], status=entry["status"], detail=entry["detail"]),
        arrival=(version, rounds, new),
        **{f"{name}_R": take(name, length) for name in entry["has"]},
    )
