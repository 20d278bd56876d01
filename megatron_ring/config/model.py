"""What the model is, under Megatron's names; Hugging Face's names occur only in families and checkpoint/convert."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from megatron_ring.config.ranges import Above, AtLeast, AtMost, OneOf
from megatron_ring.families import FAMILIES

MOST = 1 << 24
"""Largest size of a model: products of larger ones overflow in torch, which answers with a traceback."""
MOST_LAYERS = 1 << 14
"""Most layers, and most experts."""
Size = Annotated[int, Above(0), AtMost(MOST)]
SizeOrOff = Annotated[int, AtLeast(0, remedy="0 turns it off"), AtMost(MOST)]
CoefficientOrOff = Annotated[float, AtLeast(0, remedy="0 turns it off")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the model, and how its router is trained.

    Example: ``ModelConfig(family="bailing_moe", num_layers=4, hidden_size=128, num_attention_heads=4,
    num_query_groups=2, kv_channels=32, vocab_size=2048, num_experts=8,
    moe_router_topk=2, moe_ffn_hidden_size=64)``.
    """

    family: Annotated[str, OneOf(tuple(FAMILIES))] = "qwen2"
    """Published architecture this is a member of; names the map from and to Hugging Face checkpoints."""
    num_layers: Annotated[int, Above(0), AtMost(MOST_LAYERS)] = 4
    """Transformer layers, without multi-token-prediction layers."""
    hidden_size: Size = 128
    """Width of the residual stream (D)."""
    ffn_hidden_size: SizeOrOff = 384
    """Width of the MLP in dense layers; unused if every layer has experts."""
    num_attention_heads: Size = 4
    """Query heads per layer."""
    num_query_groups: Size = 2
    """Key/value heads per layer (grouped-query attention)."""
    kv_channels: Size = 32
    """Width of one attention head."""
    vocab_size: Size = 2048
    """Vocabulary of the tokenizer the model was made for, before padding."""
    make_vocab_size_divisible_by: Size = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size, as in Megatron."""
    max_position_embeddings: Size = 4096
    """Longest sequence the model is meant for, in tokens."""
    norm_epsilon: Annotated[float, Above(0)] = 1e-6
    """Epsilon of every RMSNorm."""
    init_method_std: Annotated[float, Above(0)] = 0.006
    """Standard deviation of the initial weights."""
    rotary_base: Annotated[float, Above(0)] = 600000.0
    """Base (theta) of rotary position embeddings."""
    rotary_percent: Annotated[float, Above(0, at_most=1, remedy="1 rotates whole heads")] = 1.0
    """Share of each head's width that is rotated."""
    add_qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    qk_layernorm: bool = False
    """RMSNorm on every query and key head before rotary (BailingMoeV2, Qwen3)."""
    untie_embeddings_and_output_weights: bool = True
    """The output layer has its own weight; off: it shares the embedding's (small Qwen models)."""
    norm_head: bool = False
    """Divide each column of the output weight by its norm over the vocabulary (NormHead, BailingMoe)."""
    num_experts: Annotated[int, AtLeast(0, remedy="0 turns it off"), AtMost(MOST_LAYERS)] = 0
    """Routed experts per mixture-of-experts layer; 0 makes the model dense."""
    moe_router_topk: Annotated[int, AtLeast(1, remedy="try 2"), AtMost(MOST)] = 2
    """Routed experts per token; unused in a dense model. With 1 the routing weight is the expert's score itself."""
    moe_ffn_hidden_size: Size = 64
    """Width of one routed expert (F)."""
    moe_shared_expert_intermediate_size: SizeOrOff = 0
    """Total width of the shared experts, one MLP that every token passes; 0 for none."""
    first_k_dense_replace: SizeOrOff = 0
    """The first k layers have a dense MLP of width ffn_hidden_size in place of experts."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: over all experts, top-k renormalised to 1. sigmoid: per expert, top-k divided by their sum."""
    moe_router_pre_softmax: bool = False
    """softmax: weigh the top-k by their scores over all experts, not renormalised (Qwen3-MoE: norm_topk_prob off)."""
    moe_router_num_groups: SizeOrOff = 0
    """Groups of experts for group-limited routing; 0 for none."""
    moe_router_group_topk: SizeOrOff = 0
    """Groups a token may choose experts from; 0 without groups."""
    moe_router_topk_scaling_factor: Annotated[float, Above(0)] = 1.0
    """Factor on the routing weights after normalisation (on the score with moe_router_topk 1)."""
    moe_router_enable_expert_bias: bool = False
    """Select by score plus a per-expert bias that is moved towards balance without gradients."""
    mtp_num_layers: Annotated[int, AtLeast(0, remedy="0 turns it off"), AtMost(MOST_LAYERS)] = 0
    """Multi-token-prediction layers after the last layer (BailingMoeV2; used in training only)."""
    mtp_loss_scaling_factor: CoefficientOrOff = 0.1
    """Weight of the multi-token-prediction loss, averaged over its layers."""
    moe_router_bias_update_rate: CoefficientOrOff | None = None
    """How far the expert bias moves after each optimizer step.

    None means 1e-3, and 0 in reinforcement learning, where a moving bias would change routes without a gradient.
    """
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision of router logits and scores."""
    moe_aux_loss_coeff: CoefficientOrOff = 0.0
    """Weight of the balance loss, which is 1 when balanced."""
    moe_z_loss_coeff: CoefficientOrOff = 0.0
    """Weight of the router z-loss (mean squared logsumexp of the logits)."""
    freeze_moe_router: bool = False
    """Keep the router's weights (and expert bias) as they are."""
    moe_router_warmup_iters: SizeOrOff = 0
    """Steps W of stochastic routing warm-up; 0 for none.

    Logits s become a*s + (1-a)*(mu + sigma*noise), a = min(step/W, 1), mu and sigma running statistics of s.
    """
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Where linear layers and attention come from: this package, or NVIDIA Transformer Engine (GPU only)."""

    @property
    def bias_update_rate(self) -> float:
        """The rate with its default outside reinforcement learning; see :meth:`with_still_bias` for RL's."""
        rate = self.moe_router_bias_update_rate
        return 1e-3 if rate is None else rate

    def with_still_bias(self) -> "ModelConfig":
        """The model for reinforcement learning: the bias does not move unless a rate is set."""
        is_set = self.moe_router_bias_update_rate is not None
        return self if is_set else replace(self, moe_router_bias_update_rate=0.0)

    @property
    def is_moe(self) -> bool:
        """True when some layer has routed experts."""
        return self.num_experts > 0

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, without multi-token-prediction layers."""
        return self.num_layers - self.first_k_dense_replace if self.is_moe else 0

    def is_moe_layer(self, layer: int) -> bool:
        """True when layer ``layer`` (from 0) has routed experts. MTP layers do whenever the model does."""
        return self.is_moe and layer >= self.first_k_dense_replace
