"""Rollouts as bytes: what crosses processes and what a checkpoint keeps. Safetensors, so nothing is unpickled.

Layout: the arrays of all rollouts end to end, and one JSON list with the length of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, get_args

import numpy as np
from safetensors.numpy import load, save

from megatron_ring.data.json_text import count_in, counts_in
from megatron_ring.data.prompts.same_problem import asked
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import CheckpointError
from megatron_ring.rl.types import Response, RewardResult, RewardStatus, Rollout, StopReason

_LEARNT = ("advantages", "values", "returns")
"""Rows of a rollout that are there once advantages are assigned, or with a critic."""


def rollouts_to_bytes(rollouts: Sequence[Rollout], note: Any = None) -> bytes:
    """Everything of ``rollouts``, bit for bit, in their order; ``note`` is JSON that travels with them."""
    learnt = {
        name: _joined((row for r in rollouts if (row := getattr(r, f"{name}_R")) is not None), np.float32)
        for name in _LEARNT
    }
    entries = [_entry(rollout.prompt, rollout.response) | _reward_of(rollout) for rollout in rollouts]
    return _saved([rollout.response for rollout in rollouts], entries, note, learnt)


def responses_to_bytes(responses: Sequence[tuple[Prompt, Response]]) -> bytes:
    """Responses that have no reward yet, each with its prompt."""
    entries = [_entry(prompt, response) for prompt, response in responses]
    return _saved([response for _, response in responses], entries)


def _saved(
    responses: Sequence[Response],
    entries: list[dict[str, Any]],
    note: Any = None,
    more: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    arrays = {
        "tokens": _joined((r.tokens_R for r in responses), np.int32),
        "logprobs": _joined((r.logprobs_R for r in responses), np.float32),
        "versions": _joined((r.versions_R for r in responses), np.int32),
        "routes": _joined(
            (r.routes_SLK.reshape(-1) for r in responses if r.routes_SLK is not None), np.int16
        ),
        # escaped: texts of others may hold half a surrogate pair, which has no UTF-8
        "entries": np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8),
        "note": np.frombuffer(json.dumps(note).encode(), dtype=np.uint8),
        **(more or {}),
    }
    return save(arrays)


def rollouts_from_bytes(data: bytes) -> list[Rollout]:
    """Undo :func:`rollouts_to_bytes`.

    Raises:
        CheckpointError: the bytes have another format, or are truncated.
    """
    return _read(data, _rollout)


def responses_from_bytes(data: bytes) -> list[tuple[Prompt, Response]]:
    """Undo :func:`responses_to_bytes`; raises as :func:`rollouts_from_bytes`."""
    return _read(data, _response)


def note_of(data: bytes) -> Any:
    """What :func:`rollouts_to_bytes` was given as ``note``; raises as :func:`rollouts_from_bytes`."""
    with _readable():
        return json.loads(load(data)["note"].tobytes().decode())


T = TypeVar("T")


def _read(data: bytes, build: Callable[[dict[str, Any], Callable[[str, int], np.ndarray]], T]) -> list[T]:
    with _readable():
        arrays = load(data)
        places: dict[str, int] = {}

        def take(name: str, count: int) -> np.ndarray:
            start = places.get(name, 0)
            places[name] = start + count
            part = arrays[name][start : start + count]
            if len(part) != count:
                raise ValueError(f"{name} are cut short")
            return part

        return [build(entry, take) for entry in json.loads(arrays["entries"].tobytes().decode())]


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"saved rollouts cannot be read ({error}); load an earlier checkpoint"
        ) from None


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
    # older checkpoints hold only the last turn
    own = values["asked"] if "asked" in values else asked([values["text"]])
    texts = (values["domain"], values["text"], *own)
    if not all(isinstance(text, str) for text in texts) or not isinstance(values["reference"], dict):
        raise ValueError("a prompt has a text that is not a string")
    count_in(values, "uid")
    counts_in(values, "tokens")
    return Prompt(**{**values, "tokens": tuple(values["tokens"]), "asked": tuple(own)})


def _joined(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    parts = [np.asarray(array, dtype=dtype) for array in arrays]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _entry(prompt: Prompt, response: Response) -> dict[str, Any]:
    return {
        "prompt": prompt_to_json(prompt),
        "sample": response.sample,
        "length": response.length,
        "stop": response.stop,
        "routes": None if response.routes_SLK is None else list(response.routes_SLK.shape),
    }


def _reward_of(rollout: Rollout) -> dict[str, Any]:
    reward = rollout.reward
    return {
        "score": reward.score,
        "status": reward.status,
        "detail": reward.detail,
        "arrival": list(rollout.arrival),
        "has": [name for name in _LEARNT if getattr(rollout, f"{name}_R") is not None],
        "start": rollout.start,
        "carried": rollout.carried,
    }


def _response(entry: dict[str, Any], take: Callable[[str, int], np.ndarray]) -> tuple[Prompt, Response]:
    prompt, length = prompt_from_json(entry["prompt"]), count_in(entry, "length")
    if entry["stop"] not in get_args(StopReason):
        raise ValueError("a response has no reason to stop")
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
    return prompt, response


def _rollout(entry: dict[str, Any], take: Callable[[str, int], np.ndarray]) -> Rollout:
    prompt, response = _response(entry, take)
    score, status, detail = entry["score"], entry["status"], entry["detail"]
    if type(score) not in (int, float) or status not in get_args(RewardStatus) or not isinstance(detail, str):
        raise ValueError("a response has no reward")
    version, rounds, new = counts_in(entry, "arrival")
    if not isinstance(entry["has"], list) or not set(entry["has"]) <= set(_LEARNT):
        raise ValueError("a response has unknown rows")
    return Rollout(
        prompt=prompt,
        response=response,
        reward=RewardResult(score=score, status=status, detail=detail),
        arrival=(version, rounds, new),
        # older checkpoints keep these two beside the rollouts
        start=count_in(entry, "start") if "start" in entry else 0,
        carried=count_in(entry, "carried") if "carried" in entry else 0,
        **{f"{name}_R": take(name, response.length) for name in entry["has"]},
    )
