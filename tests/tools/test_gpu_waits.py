"""What a step would make the host wait for, and what a GPU would refuse, on CUDA tensors that are only pretended."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

pytest.importorskip("triton", reason="a GPU's kernels are Triton's")

from megatron_ring.data.batch.microbatch import pack_microbatch, sent
from megatron_ring.kernels import rms_norm, route_index
from megatron_ring.train.replay import replay_report
from tools.gpu.pretend import Seen, pretending
from tools.gpu.waits import (
    SMALL,
    by_function,
    main,
    one_step,
    open_session,
    reinforcing,
    training,
)
from tools.gpu.whole import config_of

# the gradient norm decides whether there is an update, the sums are what the step reports
EVERY_STEP = {("scalar", "get_grad_norm_fp32"): 1, ("to host", "InferenceEngine._world_sums"): 1}
V2 = {
    "family": "bailing_moe_v2", "norm_head": False, "qk_layernorm": True, "mtp_num_layers": 1,
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4, "moe_router_group_topk": 2,
}  # fmt: skip


@pytest.fixture
def seen() -> Iterator[Seen]:
    with pretending() as seen:
        yield seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"moe_router_warmup_iters": 5},
        V2,
        pytest.param({"bf16": False, "moe_router_dtype": "fp64"}, marks=pytest.mark.slow),
        pytest.param({"recompute_granularity": "full"}, marks=pytest.mark.slow),
        pytest.param({"overlap_grad_reduce": True, "overlap_param_gather": True}, marks=pytest.mark.slow),
    ],
    ids=["plain", "stochastic warm-up", "v2", "fp32", "recompute", "overlap"],
)
def test_a_training_step_waits_for_its_norm_and_its_sums_alone(settings: dict):
    seen = one_step(training(replace(SMALL, microbatches=3, tokens=32), **settings))
    assert by_function(seen.waits) == EVERY_STEP
    assert not seen.pageable and seen.launches["expert_up_kernel"] > 0


def test_deterministic_mode_refuses_nothing_of_a_step_and_what_cuda_cannot_do():
    with training(SMALL, deterministic=True, **V2) as (step, _):
        step()
        x = torch.ones(3, device="cuda")
        assert x.long().cumsum(0).tolist() == [1, 2, 3]
        with pytest.raises(RuntimeError, match="cumsum"):
            x.cumsum(0)


def test_a_c3po_step_waits_once_per_pass_of_generation_and_not_per_microbatch_or_parameter():
    settings = {"critic": True, "advantage_estimator": "gae", "top_p": 0.9, "deterministic": True}
    seen = one_step(reinforcing(SMALL, **settings))
    assert by_function(seen.waits) == {
        ("to host", "ModelRunner.__call__"): SMALL.length,
        # old and reference log p
        ("to host", "with_column"): 2,
        ("to host", "Critic.values"): 1,
        ("to host", "Engine._peaks"): 1,
        # an update of the policy and one of the critic
        **dict.fromkeys(EVERY_STEP, 2),
    }
    assert not seen.pageable and seen.launches["attend_kernel"] > 0


def test_what_collectives_carry_is_on_their_device_and_one_process_asks_itself(seen: Seen):
    config = config_of(SMALL)
    with open_session(config.parallel, seed=1) as session:
        # of a stage without experts
        report = replay_report([], config.model, session.device)
        assert report.flipped == (0.0,) * config.model.num_moe_layers
        seen.clear()
        assert session.exit_wanted(also=True) and not session.exit_wanted()
    assert not seen.waits


def test_tensors_of_two_devices_are_refused_where_a_gpu_refuses_them(seen: Seen):
    x = torch.ones(3, device="cuda")
    assert (x + 1).device == torch.device("cuda", 0) and (x + torch.tensor(2.0)).is_cuda
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat((x, torch.ones(3)))
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(ValueError, match="cpu tensor"):
        rms_norm(torch.ones(2, 8, device="cuda"), torch.ones(8))
    assert not seen.waits


def test_what_waits_is_counted_and_gives_its_number(seen: Seen):
    x = torch.tensor([2.0, 0.0, 3.0], device="cuda")
    assert x.sum().item() == 5 and bool(x[0] > 1) and x.tolist() == [2, 0, 3]
    assert x[x > 0].cpu().numpy().tolist() == [2, 3] and x.nonzero().shape == (2, 1) and torch.allclose(x, x)
    kinds = [place.kind for place, count in seen.waits.items() for _ in range(count)]
    assert sorted(kinds) == ["scalar", "scalar", "size", "size", "size", "to device", "to host", "to host"]
    assert all(place.file.endswith("test_gpu_waits.py") for place in seen.waits)


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x: torch.tensor([x[0], [x[1]][0]]).tolist() == [2, 0], 2),
        (lambda x: torch.tensor([[1.0, x[2]]], device="cuda").is_cuda, 2),
        (lambda x: torch.as_tensor((x[0], x[1])).device.type == "cpu", 2),
        (lambda x: x.new_tensor([1, 2]).is_cuda, 1),
        (lambda x: f"{x[0]:.1f}" == "2.0", 1),
        (lambda x: "2." in f"{x} ", 1),
        (lambda x: "2." in str(x), 1),
        (lambda x: pickle.dumps(x) != b"", 1),
        (lambda x: torch.empty(3).copy_(x, non_blocking=True)[0] == 2, 1),
        (lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)[0] == 2, 0),
        (lambda x: x.__setitem__(x > 0, 1.0) is None, 0),
        (lambda x: x.__setitem__(x > 0, x[1]) is None, 1),
        (lambda x: x.__setitem__([0, 2], 1.0) is None, 1),
        (lambda x: x.__setitem__((None, x > 0), 1.0) is None, 0),
    ],
    ids=[
        "list", "list to device", "tuple", "new_tensor", "number in a format", "format", "str", "pickle", "to pageable",
        "to pinned", "masked fill", "fill from the device", "list as index", "masked fill behind None",
    ],
)  # fmt: skip
def test_what_looks_harmless_and_waits_is_counted(call, waits: int, seen: Seen):
    x = torch.tensor([2.0, 0.0, 3.0], device="cuda")
    seen.clear()
    assert call(x) and sum(seen.waits.values()) == waits and not seen.pageable


def test_an_index_on_the_device_of_what_is_on_the_host_is_refused(seen: Seen):
    x, index = torch.ones(3), torch.tensor([0, 2], device="cuda")
    with pytest.raises(RuntimeError, match="same device as the indexed tensor"):
        x[index]
    with pytest.raises(RuntimeError, match="same device as the indexed tensor"):
        x[index] = 1.0


def test_what_is_sent_from_pinned_memory_waits_for_nothing(seen: Seen):
    device = torch.device("cuda")
    torch.ones(3).to(device, non_blocking=True)
    assert len(seen.pageable) == 1 and not seen.waits
    seen.clear()
    whole = pack_microbatch([([1, 2], [2, 3], [1.0, 1.0])], 4).to(device)
    row = sent(torch.from_numpy(np.arange(3)), device)
    assert not seen.pageable and not seen.waits
    assert whole.tokens_T.is_cuda and whole.tokens_T.tolist() == [1, 2, 0, 0] and row.tolist() == [0, 1, 2]
    assert sent(row, device).tolist() == [0, 1, 2]


def test_gradients_and_kernels_have_the_references_numbers(seen: Seen):
    x = torch.linspace(-1, 1, 16).view(2, 8)
    weight = torch.linspace(0.5, 2, 8)
    ours = x.cuda().requires_grad_(), weight.cuda().requires_grad_()
    own = x.clone().requires_grad_(), weight.clone().requires_grad_()
    for leaves in (ours, own):
        (rms_norm(*leaves) ** 2).sum().backward()
    for mine, theirs in zip(ours, own, strict=True):
        assert mine.grad.is_cuda
        torch.testing.assert_close(mine.grad.inner, theirs.grad)
    index = route_index(torch.tensor([[1, 0], [2, 1]], device="cuda"), 2)
    assert index.offsets_E.tolist() == [1, 3]
    assert seen.launches["rms_norm_kernel"] == 1 and seen.launches["route_index_kernel"] == 1


def test_what_megatron_keeps_of_a_step_on_the_cpu_is_left_aside_and_left_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    kept = torch.tensor(2.0)
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", kept)
    assert by_function(one_step(training(SMALL)).waits) == EVERY_STEP
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lr"], "lr must be NAME=VALUE with a Python value"),
        (["bf16=True", "lr=abc"], "lr=abc must be NAME=VALUE with a Python value"),
        (["lr="], "lr= must be NAME=VALUE"),
        (["lrr=1"], "setting lrr does not exist; did you mean lr?"),
        (["=1"], "setting  does not exist"),
        (["num_layers=-1"], "num_layers=-1 must be positive"),
        (["lr='x'"], "lr='x'"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_one_line(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["waits.py", "pretrain", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code.startswith(f"error: {said}") and "\n" not in stopped.value.code


def test_afterwards_everything_is_as_before():
    before = torch.cuda.is_available(), torch.cuda.device_count()
    with pretending():
        assert torch.cuda.is_available() and torch.cuda.current_device() == 0
        left = torch.ones(2, device="cuda")
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == before
    assert torch.ones(2).device.type == "cpu"
    assert (left + 1).inner.tolist() == [2, 2]
