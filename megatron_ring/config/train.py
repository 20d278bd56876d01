"""How the model is trained: batches, length, optimizer, schedule and loss spikes."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_ring.config.ranges import Above, AtLeast, Count, CountOrOff, ZeroOrAbove


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. Steps are optimizer steps; a sample is one packed sequence of seq_length tokens.

    Example: ``TrainConfig(micro_batch_size=4, global_batch_size=32, seq_length=256, train_iters=300,
    lr=1e-3)``.
    """

    seed: Annotated[int, AtLeast(0, below=2**63, remedy="try 1234")] = 1234
    """Seed of initial weights, data order and routing noise."""
    micro_batch_size: Count = 1
    """Samples per forward pass on one data-parallel process."""
    global_batch_size: Count = 8
    """Samples per optimizer step, summed over data-parallel processes."""
    rampup_batch_size: tuple[Count, Count, Count] | None = None
    """Batch-size warm-up (start, increment, samples): start grows to global_batch_size over those samples."""
    seq_length: Count = 256
    """Tokens per sample."""
    train_iters: CountOrOff = 100
    """Steps of the whole run, including those before a resume; an RL step has minibatches_per_step updates."""
    eval_interval: CountOrOff = 0
    """Steps between validations; 0 for none."""
    eval_iters: CountOrOff = 10
    """Global batches per validation."""
    lr: Annotated[float, Above(0, remedy="try 3e-4")] = 3e-4
    """Highest learning rate."""
    min_lr: Annotated[float, AtLeast(0)] = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "cosine", "WSD", "inverse-square-root"] = "cosine"
    """Shape of the schedule after warm-up."""
    lr_warmup_iters: CountOrOff = 0
    """Steps of linear warm-up from 0 to lr."""
    lr_decay_iters: Annotated[int, AtLeast(1, remedy="drop it to decay over train_iters")] | None = None
    """Step at which the decay ends; none means train_iters."""
    lr_wsd_decay_iters: CountOrOff = 0
    """WSD only: length of the final decay, in steps."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    """WSD only: shape of the final decay."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.1
    """Decoupled weight decay (AdamW); not on biases and norms."""
    adam_beta1: Annotated[float, AtLeast(0, below=1, remedy="try 0.9")] = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: Annotated[float, AtLeast(0, below=1, remedy="try 0.95")] = 0.95
    """AdamW's second-moment decay."""
    adam_eps: Annotated[float, Above(0, remedy="try 1e-8")] = 1e-8
    """AdamW's epsilon."""
    clip_grad: Annotated[float, AtLeast(0)] = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    loss_spike_factor: Annotated[float, ZeroOrAbove(1, remedy="try 1.5")] = 0.0
    """Skip an update if its loss exceeds this times the running mean of recent losses; 0 for off."""
    loss_spike_window: Annotated[int, AtLeast(1, remedy="try 100")] = 100
    """Steps in that running mean; no update is skipped in a run's first steps, before it is full."""
    loss_spike_retry_lr_factor: Annotated[float, Above(0, at_most=1, remedy="try 0.5")] = 0.5
    """Factor on the learning rate if a step's samples were skipped for a spike before and spike again."""
    exit_interval: CountOrOff = 0
    """Save and exit when the step is a multiple of this; 0 for off."""
    exit_duration_in_mins: Annotated[float, AtLeast(0)] = 0.0
    """Save and exit after this many minutes; 0 for off."""
    deterministic: bool = False
    """Only bit-reproducible operations (slower on a GPU; the CPU always is)."""
