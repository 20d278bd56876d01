"""What tools/benchmark/static.py compiles: each Triton kernel at the shapes and types of Ring."""

from dataclasses import dataclass, field

import torch
import triton

from megatron_ring.kernels.decode_attention import kernel as decode_attention
from megatron_ring.kernels.expert_mlp import kernel as expert_mlp
from megatron_ring.kernels.grouped_gemm import kernel as grouped_gemm
from megatron_ring.kernels.permute import kernel as permute
from megatron_ring.kernels.qk_norm_rope import kernel as qk_norm_rope
from megatron_ring.kernels.rms_norm import kernel as rms_norm
from megatron_ring.kernels.route_index import kernel as route_index
from megatron_ring.kernels.routing import kernel as routing
from megatron_ring.kernels.sample_token import kernel as sample_token
from megatron_ring.kernels.token_logprob import kernel as token_logprob


@dataclass(frozen=True)
class Spec:
    """One kernel to compile: its argument types, its constants and its launch options."""

    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    options: dict[str, object]
    unaligned: tuple[str, ...] = field(default=("num_experts", "num_rows", "tiles_n", "tiles_f", "tiles_d"))


def _block(*shape: int, dtype: str = "bf16") -> str:
    return f"tensordesc<{dtype}{list(shape)}>"


def _constants(t: grouped_gemm.Tiles, **more: object) -> dict[str, object]:
    shape = {"BM": t.bm, "BN": t.bn, "BK": t.bk, "GROUP": t.group}
    return {**shape, "UPCAST": False, "PRECISION": "ieee", **more}


_WALK = {"offsets_ptr": "*i32", "num_experts": "i32", "num_rows": "i32", "reduced": "i32", "tiles_n": "i32"}


def product_specs(arch: int) -> dict[str, Spec]:
    """The grouped products and the experts' fused kernels at Ring's shape: bf16, 64 experts."""
    specs = {}
    t = grouped_gemm.tiles_for("rows", torch.bfloat16, arch)
    quarter = _block(1, 1, t.bm, t.bn // 4)
    for name, nt, w_block in (("nt", True, _block(1, t.bn, t.bk)), ("nn", False, _block(1, t.bk, t.bn))):
        signature = {**_WALK, "x_desc": _block(t.bm, t.bk), "w_desc": w_block, "y_desc": quarter}
        specs[f"grouped_gemm_{name}"] = Spec(
            grouped_gemm.grouped_gemm_rows_kernel, signature, _constants(t, NT=nt, E_PAD=128), t.options()
        )
    t = grouped_gemm.tiles_for("weight", torch.bfloat16, arch)
    for name, accumulate, dtype in (("weight", False, "bf16"), ("weight_accumulate", True, "fp32")):
        signature = {"offsets_ptr": "*i32", "num_experts": "i32", "tiles_f": "i32", "tiles_d": "i32"}
        signature |= {"dy_desc": _block(1, 1, t.bk, t.bm), "x_desc": _block(1, 1, t.bk, t.bn)}
        signature |= {"dw_desc": _block(1, t.bm, t.bn // 4, dtype=dtype)}
        constants = _constants(t, ACCUMULATE=accumulate)
        specs[name] = Spec(grouped_gemm.grouped_gemm_weight_kernel, signature, constants, t.options())
    t = grouped_gemm.tiles_for("up", torch.bfloat16, arch)
    quarter = _block(1, 1, t.bm, t.bn // 4)
    signature = {**_WALK, "probs_ptr": "*fp32", "x_desc": _block(t.bm, t.bk), "w_desc": _block(1, t.bn, t.bk)}
    signature |= dict.fromkeys(("gate_desc", "up_desc", "h_desc"), quarter)
    for name, training in (("up", True), ("up_inference", False)):
        constants = _constants(t, STORE_Z=training, HAS_PROBS=True, E_PAD=128)
        specs[name] = Spec(expert_mlp.expert_up_kernel, signature, constants, t.options())
    t = grouped_gemm.tiles_for("down", torch.bfloat16, arch)
    signature = {**_WALK, "probs_ptr": "*fp32", "partial_ptr": "*fp32"}
    signature |= {"dy_desc": _block(t.bm, t.bk), "w_desc": _block(1, t.bk, t.bn)}
    signature |= dict.fromkeys(("gate_desc", "up_desc"), _block(t.bm, t.bn // 4))
    signature |= dict.fromkeys(("dgate_desc", "dup_desc", "h_desc"), _block(1, 1, t.bm, t.bn // 4))
    constants = _constants(t, HAS_PROBS=True, E_PAD=128)
    specs["down_backward"] = Spec(expert_mlp.expert_down_backward_kernel, signature, constants, t.options())
    return specs


def _route_specs(name: str, E: int, K: int, groups: int, open_groups: int) -> dict[str, Spec]:
    """Routing forward and backward: softmax without groups, sigmoid with groups and a bias."""
    sigmoid, tokens = groups > 0, routing._tokens_per_block(E)
    shape = {
        "E": E,
        "EP": E,
        "K": K,
        "BT": tokens,
        "SIGMOID": sigmoid,
        "MASKED": True,
        "scaling": 1.0,
        "epsilon": 1e-20,
    }
    pointers = {"logits_ptr": "*fp32", "valid_ptr": "*i1", "experts_ptr": "*i64", "tokens": "i32"}
    forward = shape | {"KP": 8, "G": groups, "GP": max(groups, 1), "TOP": open_groups, "BIASED": sigmoid}
    forward |= {"REPLAYED": False, "replay_ptr": None} | ({} if sigmoid else {"bias_ptr": None})
    outputs = {"bias_ptr": "*fp32", "probs_ptr": "*fp32", "counts_ptr": "*i32", "sums_ptr": "*fp32"}
    backward = shape | {"BT": routing._tokens_per_backward_block(E)}
    backward |= {"PROBS": True, "STATISTIC": True, "SQUARE": True}
    gradients = dict.fromkeys(("dprobs_ptr", "dsum_ptr", "dz_ptr", "out_ptr"), "*fp32")
    return {
        f"route_{name}": Spec(
            routing.route_kernel, pointers | outputs, forward, routing.OPTIONS, ("tokens",)
        ),
        f"route_backward_{name}": Spec(
            routing.route_backward_kernel, pointers | gradients, backward, routing.OPTIONS, ("tokens",)
        ),
    }


def row_specs() -> dict[str, Spec]:
    """The kernels that stream rows: routing, permutation, log p and entropy, norm, at Ring's shape in bf16."""
    specs = _route_specs("softmax", 64, 6, 0, 0) | _route_specs("sigmoid", 256, 8, 8, 4)
    sums = {"counts_ptr": "*i32", "sums_ptr": "*fp32", "count_ptr": "*i64", "sum_ptr": "*fp32"}
    specs["route_sum"] = Spec(
        routing.route_sum_kernel,
        sums | {"blocks": "i32", "E": "i32"},
        {"BB": 128, "BE": 16},
        routing.OPTIONS,
        ("blocks",),
    )
    index = {"experts_ptr": "*i64", "offsets_ptr": "*i32", "gather_ptr": "*i64", "position_ptr": "*i64"}
    specs["route_index"] = Spec(
        route_index.route_index_kernel,
        index | {"slots": "i32", "E": "i32"},
        {"K": 6, "BS": route_index.SLOTS},
        route_index.OPTIONS,
        ("slots",),
    )
    rows = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*bf16", "dout_ptr": "*bf16", "dy_ptr": "*bf16"}
    rows |= {"gather_ptr": "*i64", "position_ptr": "*i64", "offsets_ptr": "*i32", "weights_ptr": "*fp32"}
    rows |= {"dweights_ptr": "*fp32", "num_rows": "i32", "tokens": "i32", "width": "i32", "E": "i32"}
    counts, weighted = ("num_rows", "tokens", "E"), {"K": 6, "WEIGHTED": True, "ACC": triton.language.float32}
    specs["permute"] = Spec(permute.permute_kernel, rows, {"BN": 4, "BD": 1024}, permute.OPTIONS, counts)
    specs["combine"] = Spec(
        permute.combine_kernel, rows, weighted | {"BT": 2, "BD": 512}, permute.OPTIONS, counts
    )
    backward = weighted | {"KP": 8, "WEIGHT_GRADIENT": True, "BD": 512}
    specs["combine_backward"] = Spec(permute.combine_backward_kernel, rows, backward, permute.OPTIONS, counts)
    columns = {"logits_ptr": "*bf16", "stride": "i32", "local_ptr": "*i64", "columns": "i32", "width": "i32"}
    constants = {"tau": 0.7, "ACC": triton.language.float32, "BV": token_logprob.BLOCK}
    specs["logprob_partials"] = Spec(
        token_logprob.token_logprob_partials_kernel,
        columns | {"out_ptr": "*fp32"},
        constants,
        token_logprob.PARTIALS,
        ("columns",),
    )
    columns |= dict.fromkeys(
        ("max_ptr", "log_sum_ptr", "entropy_ptr", "dlogp_ptr", "dentropy_ptr"), "*fp32"
    ) | {"out_ptr": "*bf16", "out_stride": "i32"}
    specs["logprob_gradient"] = Spec(
        token_logprob.token_logprob_gradient_kernel,
        columns,
        constants | {"ENTROPY": True},
        token_logprob.OPTIONS,
        ("columns",),
    )
    norm = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr", "dy_ptr", "dx_ptr"), "*bf16")
    norm |= {"r_ptr": "*fp32", "parts_ptr": "*fp32", "tokens": "i32", "D": "i32"}
    tile = {"ACC": triton.language.float32, "BT": 1, "BD": 2048}
    for name, kernel in (
        ("forward", rms_norm.rms_norm_kernel),
        ("backward", rms_norm.rms_norm_backward_kernel),
    ):
        constants = tile | ({"eps": 1e-6} if name == "forward" else {})
        specs[f"rms_norm_{name}"] = Spec(kernel, norm, constants, rms_norm.OPTIONS, ("tokens",))
    return specs | _rope_specs()


def _rope_specs() -> dict[str, Spec]:
    """Head norms and rotary positions: 4 query heads to a key/value head of 128 channels, half of them rotated."""
    names = "mixed q_weight k_weight q k v dq dk dv dmixed"
    signature = {f"{name}_ptr": "*bf16" for name in names.split()}
    signature |= {"rotary_ptr": "*fp32", "parts_ptr": "*fp32"}
    signature |= dict.fromkeys(("items", "tokens", "G", "H"), "i32")
    shape = {"R": 4, "C": 128, "eps": 1e-6, "NORM": True, "ACC": triton.language.float32, "BM": 8, "BC": 128}
    return {
        f"qk_norm_rope_{name}": Spec(kernel, signature, shape, qk_norm_rope.OPTIONS, ("items", "tokens", "G"))
        for name, kernel in (
            ("forward", qk_norm_rope.qk_norm_rope_kernel),
            ("backward", qk_norm_rope.qk_norm_rope_backward_kernel),
        )
    }


def decode_specs() -> dict[str, Spec]:
    """The kernels of one decoding step in bf16: 4 query heads to a key/value head of 128 channels; a draw."""
    attend = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16") | {"scale": "fp32"}
    attend |= {"rows_ptr": "*i64", "positions_ptr": "*i64"} | dict.fromkeys("LGRC", "i32")
    tile = {"ACC": triton.language.float32, "BR": 4, "BL": 16, "BC": 128}
    draw = {"logits_ptr": "*bf16", "uniform_ptr": "*fp64", "threshold_ptr": "*bf16", "tokens_ptr": "*i64"}
    draw |= {"logp_ptr": "*fp32", "stride": "i32", "V": "i32", "inverse_temperature": "fp32"}
    block = {"BOUNDED": True, "ACC": triton.language.float32, "BV": 1024}
    return {
        "decode_attention": Spec(
            decode_attention.attend_kernel, attend, tile, decode_attention.OPTIONS, ("L", "G", "R")
        ),
        "sample_token": Spec(sample_token.sample_kernel, draw, block, sample_token.OPTIONS, ("V",)),
    }
