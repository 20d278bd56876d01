"""How the model is trained: batches, length, optimizer, schedule, and what to do about loss spikes."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. Steps are optimizer steps; a sample is one packed sequence of seq_length tokens.

    Example: ``TrainConfig(micro_batch_size=4, global_batch_size=32, seq_length=256, train_iters=300,
    lr=1e-3)``.
    """

    seed: int = 1234
    """Seed of initial weights, data order and routing noise."""
    micro_batch_size: int = 1
    """Samples per forward pass on one data-parallel process."""
    global_batch_size: int = 8
    """Samples per optimizer step, summed over data-parallel processes."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """Batch-size warm-up (start, increment, samples): start grows to global_batch_size over those samples."""
    seq_length: int = 256
    """Tokens per sample."""
    train_iters: int = 100
    """Steps in the whole run, those before a resume included; an RL step has minibatches_per_step updates."""
    eval_interval: int = 0
    """Steps between validations; 0 for none."""
    eval_iters: int = 10
    """Global batches per validation."""
    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "cosine", "WSD", "inverse-square-root"] = "cosine"
    """Shape of the schedule after warm-up."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0 to lr."""
    lr_decay_iters: int | None = None
    """Step at which the decay has ended; none means train_iters."""
    lr_wsd_decay_iters: int = 0
    """WSD only: length of the final decay, in steps."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    """WSD only: shape of the final decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay (AdamW); not on biases and norms."""
    adam_beta1: float = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: float = 0.95
    """AdamW's second-moment decay."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    loss_spike_factor: float = 0.0
    """Skip an update whose loss exceeds this times the running mean of recent losses; 0 for off."""
    loss_spike_window: int = 100
    """Steps in that running mean; nothing is skipped before it is full."""
    loss_spike_retry_lr_factor: float = 0.5
    """Factor on the learning rate of a step whose samples spiked before and spike again."""
    exit_interval: int = 0
    """Save and exit when the step is a multiple of this; 0 for off."""
    exit_duration_in_mins: float = 0.0
    """Save and exit after this many minutes; 0 for off."""
    deterministic: bool = False
    """Only bit-reproducible operations (slower on a GPU; the CPU always is)."""
