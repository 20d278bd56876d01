"""One frozen object for a run: model, layout, training, data, checkpoints and logging."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.ranges import AtLeast, CountOrOff
from megatron_ring.config.rl import BudgetConfig, ObjectiveConfig, RewardConfig, RolloutConfig
from megatron_ring.config.sft import SftConfig
from megatron_ring.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Corpus and tokenizer.

    Example: ``DataConfig(data_path=("0.3", "corpus/code", "0.7", "corpus/web"),
    tokenizer_model="tok.model")``.
    """

    data_path: tuple[str, ...] = ()
    """Prefix of a .bin/.idx pair. Several: weight, prefix, weight, prefix ..."""
    split: str = "949,50,1"
    """Shares of documents for training, validation and test."""
    tokenizer_type: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    """sentencepiece: a .model file. huggingface: a tokenizer.json or the folder that holds it."""
    tokenizer_model: str | None = None
    """File (or folder) of the tokenizer."""
    chat_template_kwargs: str = ""
    """Variables of the chat template, as a JSON object such as {"enable_thinking": false}."""
    reset_at_document: bool = True
    """Attention and positions start again at each document within a sample."""
    num_workers: Annotated[int, AtLeast(0, remedy="0 reads in the training process")] = 0
    """Workers that read data: threads in pre-training, processes in fine-tuning; 0 for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """What is saved and loaded.

    Example: ``CheckpointConfig(save="runs/a/checkpoints", save_interval=100, keep_last_n=3)``.
    """

    save: str | None = None
    """Folder for checkpoints; none saves nothing."""
    load: str | None = None
    """Folder to load the latest checkpoint from."""
    pretrained_checkpoint: str | None = None
    """Folder whose latest weights the run starts from, unless --load has a checkpoint."""
    save_interval: CountOrOff = 0
    """Steps between checkpoints; 0 saves only at the end."""
    async_save: bool = False
    """Write checkpoints in the background, from a snapshot, while training continues."""
    keep_last_n: CountOrOff = 0
    """Checkpoints to keep: the one just saved and those before it; 0 keeps all."""
    finetune: bool = False
    """Load weights only and start at step 0."""
    no_load_optim: bool = False
    """Do not load optimizer state."""
    no_load_rng: bool = False
    """Do not load random-number states."""
    verify_checkpoint_integrity: bool = False
    """Compare the checksums of a checkpoint's files before it is loaded."""
    ckpt_format: Literal["torch_dist"] = "torch_dist"
    """Format of checkpoints: Megatron's sharded torch_dist."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Progress lines, metrics and profiles.

    Example: ``LoggingConfig(log_interval=10, metrics_file="runs/a/metrics.jsonl")``.
    """

    log_interval: Annotated[int, AtLeast(1, remedy="set --log-interval 1")] = 1
    """Steps between progress lines, as long as they are log_interval_seconds apart."""
    log_interval_seconds: Annotated[float, AtLeast(0, remedy="0 prints every progress line")] = 30.0
    """Seconds between progress lines at least; 0 prints every one. Metrics are written at every step."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard events."""
    metrics_file: str | None = None
    """JSONL file with one object per step."""
    wandb_project: str | None = None
    """Weights & Biases project."""
    profile: bool = False
    """Write a torch trace of the steps profile_step_start to profile_step_end."""
    profile_step_start: CountOrOff = 10
    """First profiled step."""
    profile_step_end: CountOrOff = 12
    """Step before which profiling stops."""
    peak_tflops: Annotated[float, AtLeast(0, remedy="0 means unknown")] = 0.0
    """Peak of one device in TFLOP/s, for model FLOP utilisation; 0 when unknown."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Show messages of this level and above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """All settings of a run. Example: ``RunConfig(train=TrainConfig(lr=1e-3))``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
