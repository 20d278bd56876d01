"""One process of the proof that a policy step is the same at every layout: ``policy_worker.py WORLD FOLDER``.

The single process packs everything into one microbatch; every layout packs it into eight, one of them empty.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_ring.rl.batch.microbatch import with_routes
from megatron_ring.rl.learn.critic import Critic
from megatron_ring.rl.learn.objective import metrics
from megatron_ring.rl.learn.reference_policy import ReferencePolicy
from megatron_ring.runtime.session import Session
from megatron_ring.train.engine import Engine
from tests.helpers.parallel.cases import Case
from tests.helpers.parallel.collect import local_shards
from tests.helpers.parallel.running import engine_at_start, reduce_whole_gradients, run_cases
from tests.helpers.rl.policy_cases import PACKINGS, PICKS, Scored, rollouts
from tests.helpers.rl.policy_step import TEMPERATURE, microbatches_of, objective_of, scored_rollouts

REFERENCES = [Case("v1", 1), Case("v2", 1), Case("qwen3_moe", 1)]
CASES = [
    *(Case("v1", 2, layout) for layout in (dict(tp=2), dict(pp=2), dict(ep=2), dict(), dict(pp=2, vpp=2))),
    Case("v1", 2, dict(tp=2, recompute="full")),
    Case("v2", 2, dict(pp=2)),
    *(Case("v1", 4, layout) for layout in (dict(tp=2, pp=2), dict(tp=2, ep=2), dict(pp=2, ep=2))),
    Case("v2", 4, dict(tp=2, pp=2, recompute="full")),
    Case("v1", 8, dict(tp=2, pp=2, ep=2)),
    Case("v1", 8, dict()),
    Case("v2", 8, dict(tp=2, pp=2, ep=2)),
    Case("qwen3_moe", 2, dict(tp=2)),
    Case("qwen3_moe", 2, dict(pp=2)),
    Case("qwen3_moe", 4, dict(tp=2, pp=2)),
]


def foreign_routes(case_model: str, layers: int, topk: int, microbatches, packing: str) -> list[torch.Tensor]:
    """The same random experts for the same token of the same response, wherever it is packed."""
    out = []
    for row, microbatch in zip(PACKINGS[packing], microbatches, strict=True):
        routes_LTK = torch.full((layers, microbatch.num_slots, topk), -1, dtype=torch.int16)
        place = 0
        for index in row:
            generator = torch.Generator().manual_seed(1000 + index)
            slots = len(rollouts()[index].prompt.tokens) + PICKS[index].stop - 1
            for layer in range(layers):
                scores = torch.rand(slots, 8, generator=generator)
                routes_LTK[layer, place : place + slots] = scores.topk(topk).indices.to(torch.int16)
            # a few tokens without recorded routes
            routes_LTK[:, place + 1] = -1
            place += slots
        out.append(routes_LTK)
    return out


def run_case(case: Case, session: Session, folder: Path, *, is_reference: bool) -> None:
    engine = engine_at_start(
        case, session, folder, is_reference=is_reference, moe_aux_loss_coeff=0.0, microbatch_capacity=48
    )
    config, samples_file = engine.config, folder / f"own-{case.model}.pt"
    reduce_whole_gradients(engine)
    packing = "one" if is_reference else "eight"
    if is_reference:
        scored, samples = scored_rollouts(engine)
        torch.save([scored.old, scored.ref, [s.response.logprobs_R.tolist() for s in samples]], samples_file)
    scored, samples = read_samples(samples_file)
    whole = microbatches_of(scored, samples, packing)
    layers, topk = config.model.num_moe_layers, config.model.moe_router_topk
    foreign = foreign_routes(case.model, layers, topk, whole, packing)
    dp, rank = session.topology.dp_size, session.topology.dp_rank
    share = slice(rank * len(whole) // dp, (rank + 1) * len(whole) // dp)
    own, routes = whole[share], foreign[share]
    out = folder / case.name
    out.mkdir(exist_ok=True)
    objective = objective_of()
    objective = replace(objective, facts=replace(objective.facts, dp_size=dp))
    summary = {}
    for name, microbatches in (("plain", own), ("replayed", with_routes(own, routes))):
        report = engine.accumulate(microbatches, objective)
        torch.save(local_shards(engine, gradients=True), out / f"{name}.{session.rank}.pt")
        summary[name] = {**metrics([report]), "grad_norm": report.grad_norm, "z": report.z_loss}
        if report.replay:
            rates = {f"flips{i}": rate for i, rate in enumerate(report.replay.flip_rates)}
            summary[name] |= {**rates, "missing": report.replay.missing_share}
    _, recorded = engine.score_with_routes(own, TEMPERATURE)
    report = engine.accumulate(with_routes(own, recorded), objective)
    summary["own"] = {"loss": report.loss, "grad_norm": report.grad_norm}
    summary["own_flips"] = max(report.replay.flip_rates) + report.replay.missing_share
    summary["critic"] = critic_step(engine, own, out)
    summary["reference_leaves_no_trace"] = reference_leaves_no_trace(engine, report, own)
    if session.is_save_rank:
        (out / "summary.json").write_text(json.dumps(summary))


def critic_step(engine: Engine, own, out: Path) -> dict[str, float]:
    """Loss of a value model with a head that is not 0; its gradients go to disk."""
    critic = Critic(engine.config, engine.session)
    critic.start_from(engine)
    reduce_whole_gradients(critic.engine)
    last = critic.engine.models[-1]
    if last.post_process:
        with torch.no_grad():
            last.output_layer.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    critic.engine.optimizer.reload_model_params()
    report = critic.engine.accumulate(with_old_values(critic, own), critic.objective)
    torch.save(local_shards(critic.engine, gradients=True), out / f"critic.{engine.session.rank}.pt")
    # packed by the critic itself: whole responses, given out to the ranks in turn
    topology = engine.topology
    mine = rollouts()[topology.dp_rank :: topology.dp_size]
    total = torch.tensor([float(sum(values_R.sum() for values_R in critic.values(mine)))])
    torch.distributed.all_reduce(total, group=topology.groups.dp)
    return {"loss": report.loss, "grad_norm": report.grad_norm, **report.means, "values": total.item()}


def with_old_values(critic: Critic, microbatches):
    """The microbatches with the critic's values of now, and returns = advantages + values."""
    scored = critic._scored(microbatches)
    return [
        replace(m, values_T=v_T.cpu(), returns_T=m.advantages_T + v_T.cpu())
        for m, v_T in zip(microbatches, scored, strict=True)
    ]


def reference_leaves_no_trace(engine: Engine, report, own) -> float:
    """1 where the start is scored after an update, and this rank's weights come back bit for bit."""
    start = engine.score(own)
    reference = ReferencePolicy(engine)
    engine.update(report, 1e-2)
    engine.gather_parameters()
    before = [
        value.clone() for model in engine.models for value in model.state_dict().values() if value is not None
    ]
    scored = reference.score(own)
    after = [value for model in engine.models for value in model.state_dict().values() if value is not None]
    same = all(map(torch.equal, before, after)) and all(
        torch.equal(logp_T, row_T) for (logp_T, _), row_T in zip(start, scored, strict=True)
    )
    now = engine.score(own)
    moved = not any(
        torch.equal(logp_T, row_T) for (logp_T, _), row_T in zip(now, scored, strict=True) if row_T.any()
    )
    good = torch.tensor(float(same and moved))
    torch.distributed.all_reduce(good, op=torch.distributed.ReduceOp.MIN)
    return good.item()


def read_samples(path: Path):
    """The policies that the single process scored, and rollouts with the third one's log probabilities."""
    old, ref, rolled = torch.load(path, weights_only=True)
    samples = [
        replace(s, response=replace(s.response, logprobs_R=np.array(row, dtype=np.float32)))
        for s, row in zip(rollouts(), rolled, strict=True)
    ]
    return Scored(old=old, ref=ref), samples


if __name__ == "__main__":
    run_cases(REFERENCES, CASES, run_case)
