"""Save and load the whole training state at any layout; on request, save while training continues."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ring.checkpoint import folder as folders
from megatron_ring.checkpoint.checksums import Summed, check_share, sum_bytes
from megatron_ring.checkpoint.format import (
    CONVERTED,
    RUN_CONFIG,
    TRAINER_STATE,
    TrainerState,
    check_contents,
)
from megatron_ring.checkpoint.index import CheckpointIndex
from megatron_ring.checkpoint.megatron_io import SaveSummed, check_common, load_sharded
from megatron_ring.checkpoint.plain_files import shown
from megatron_ring.checkpoint.rng import gather_rng, load_rng, save_rng
from megatron_ring.checkpoint.state import (
    Checkpointable,
    load_optimizer,
    load_tensors,
    model_state,
    optimizer_state,
    optimizer_step_count,
    tensors_only,
)
from megatron_ring.config.dump import dump_toml
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.run import RunConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.model.sharding import SHARDING
from megatron_ring.runtime.orphans import forked_writer
from megatron_ring.runtime.peers import follows_from_another
from megatron_ring.runtime.session import Session

log = logging.getLogger("megatron_ring")

_SHAPE_FIELDS = (
    "family",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "first_k_dense_replace",
    "add_qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "norm_head",
    "moe_router_enable_expert_bias",
    "mtp_num_layers",
)
"""Settings that decide which tensors a model has and of what shape."""

_FAILURES = (OSError, RuntimeError, CheckpointingException, CheckpointException)
"""What reading and writing a checkpoint raises when files fail; CheckpointException derives from BaseException."""


def layout_of(config: RunConfig, world_size: int) -> dict[str, int]:
    """World size and model-parallel sizes: if they are equal in two runs, their ranks correspond one to one."""
    p = config.parallel
    return {
        "world_size": world_size,
        "tensor_model_parallel_size": p.tensor_model_parallel_size,
        "pipeline_model_parallel_size": p.pipeline_model_parallel_size,
        "expert_model_parallel_size": p.expert_model_parallel_size,
        "expert_tensor_parallel_size": p.expert_tensor_parallel_size,
    }


class Checkpointer:
    """Writes and reads the checkpoints of one run.

    Every method is collective over the world. An asynchronous save forks a writer process, whose copy-on-write memory is
    the snapshot. It becomes the latest checkpoint at the first :meth:`poll` or :meth:`finish` after the writer is done.
    """

    def __init__(self, config: RunConfig, engine: Checkpointable, session: Session, *, stage: str):
        """``stage`` is recorded in every save; only checkpoints of the same stage can be resumed from."""
        self.config = config
        self.engine = engine
        self.session = session
        self.stage = stage
        self._caller = TemporalAsyncCaller()
        self._pending: tuple[AsyncRequest, Path, Callable[[], None]] | None = None
        self.loaded_folder: Path | None = None
        """The checkpoint that :meth:`load` resumed from."""
        self.began_from: Path | None = None
        """The checkpoint whose weights alone were loaded; None if the run started from random weights."""

    def save(
        self, iteration: int, trainer: dict[str, Any], attachments: Mapping[str, bytes] | None = None
    ) -> None:
        """Save weights, optimizer, random states and ``trainer``, the stage's own state (JSON-able).

        ``attachments`` are further files of this rank (name -> contents; names differ between ranks). A resumed run
        finds them in :attr:`loaded_folder`.

        Raises:
            CheckpointError: the folder cannot be written or the disk is full; the previous checkpoint stays.
        """
        self.finish()
        assert self.config.checkpoint.save is not None, "a run without --save saves nothing"
        root = Path(self.config.checkpoint.save)
        model = model_state(self.engine)
        sharded = {**model, **optimizer_state(self.engine, model, is_loading=False)}
        working = self._begin(root, iteration, sharded)
        state = TrainerState(
            iteration=iteration,
            optimizer_steps=self._agreed_step_count(),
            layout=layout_of(self.config, self.session.world_size),
            model=_shape_of(self.config.model),
            stage=self.stage,
            trainer=trainer,
        )
        rng = gather_rng(self.session)
        sums = self._sums_of(attachments or {})
        strategy = SaveSummed(self.config.checkpoint.ckpt_format)

        def complete() -> None:
            save_rng(rng, working)
            state.write(working)
            (working / RUN_CONFIG).write_text(dump_toml(self.config), encoding="utf-8")
            folders.commit(working, iteration, {**sums, **strategy.sums})
            folders.prune(root, iteration, self.config.checkpoint.keep_last_n)

        def publish() -> None:
            with self._writing(working):
                self._on_save_rank(complete)
            if self.session.is_log_rank:
                log.info("saved step %d to %s", iteration, folders.folder_of(root, iteration))

        with self._writing(working):
            request = self._write(sharded, working, strategy)
            # after Megatron's own files: it warns of a corrupted checkpoint if the folder is not empty
            for name, contents in (attachments or {}).items():
                (working / name).write_bytes(contents)
        if request is None:
            torch.distributed.barrier()
            publish()
        else:
            if request.async_fn is not None:
                request = request._replace(async_fn=forked_writer(request.async_fn))
            self._caller.schedule_async_call(request.freeze())
            self._pending = (request, working, publish)

    def poll(self) -> None:
        """Publish a pending asynchronous save if every rank has finished writing."""
        if self._pending and self._caller.is_current_async_call_done(blocking=False, no_dist=False):
            self._finalize()

    def finish(self) -> None:
        """Wait for a pending asynchronous save and publish it."""
        if self._pending:
            self._caller.is_current_async_call_done(blocking=True, no_dist=False)
            self._finalize()

    def load(self, root: str | Path) -> dict[str, Any] | None:
        """Load the latest checkpoint under ``root`` (or ``root`` itself) and return its trainer state.

        ``None`` when there is none yet. With ``finetune``, weights only, and ``None`` too.

        Raises:
            CheckpointError: missing pieces, or a checkpoint of another stage or model.
        """
        folder = self._find(Path(root))
        if folder is None:
            return None
        settings = self.config.checkpoint
        state = TrainerState.read(folder)
        if settings.finetune:
            self._restore(folder, state, with_optimizer=False)
            self.began_from = folder
            return None
        self._check_stage(folder, state.stage)
        self._restore(folder, state, with_optimizer=not settings.no_load_optim)
        self.loaded_folder = folder
        if not settings.no_load_rng:
            same = state.layout == layout_of(self.config, self.session.world_size)
            load_rng(folder, self.session, same)
        return state.trainer

    def load_weights(self, root: str | Path) -> None:
        """Load the weights alone of the latest checkpoint under ``root`` (or ``root`` itself).

        Raises:
            CheckpointError: there is none, pieces are missing, or it is of another model.
        """
        folder = Path(root)
        if not (folder / TRAINER_STATE).exists():
            folder = folders.latest(folder) if folder.is_dir() else None
        if folder is None:
            raise CheckpointError(f"{root}: holds no checkpoint; name a folder that a run saved to")
        self._restore(folder, TrainerState.read(folder), with_optimizer=False)
        self.began_from = folder

    def _restore(self, folder: Path, state: TrainerState, *, with_optimizer: bool) -> None:
        """Load a checkpoint's tensors into the engine."""
        if state.stage == folders.CRITIC != self.stage:
            raise CheckpointError(
                f"{folder}: holds a critic, not a language model; name its policy's checkpoint"
            )
        self._check_model(folder, state.model)
        index = check_contents(folder)
        check_common(folder)
        if self.config.checkpoint.verify_checkpoint_integrity:
            self._verify(folder)
        model = model_state(self.engine)
        wanted: dict[str, Any] = {name: tensors_only(state) for name, state in model.items()}
        if with_optimizer:
            wanted.update(optimizer_state(self.engine, model, is_loading=True))
        loaded = self._read(wanted, folder, index)
        for number, chunk in enumerate(self.engine.models):
            load_tensors(chunk, model[f"model{number}"], loaded[f"model{number}"])
        if with_optimizer:
            load_optimizer(self.engine, loaded, state.optimizer_steps)
        else:
            self.engine.on_weights_changed()

    def _find(self, root: Path) -> Path | None:
        if (root / TRAINER_STATE).exists():
            return root
        if not root.is_dir():
            if self.config.checkpoint.load == self.config.checkpoint.save:
                return None
            raise CheckpointError(f"--load {root}: no such folder; name one that a run saved to")
        return folders.latest(root)

    def _check_stage(self, folder: Path, saved: str | None) -> None:
        """Refuse to resume from what another stage saved. Checkpoints without a recorded stage pass."""
        if saved in (None, self.stage):
            return
        origin = (
            "converted from Hugging Face weights" if saved == CONVERTED else f"saved by stage {shown(saved)}"
        )
        raise CheckpointError(
            f"{folder}: {origin}, which --load cannot resume in stage {self.stage!r}; start from its weights alone "
            "with --pretrained-checkpoint (or --load and --finetune), and give --save another folder"
        )

    def _check_model(self, folder: Path, saved: dict[str, Any]) -> None:
        wanted = _shape_of(self.config.model)
        # checkpoints from before tied weights were supported do not record the setting
        saved = {"untie_embeddings_and_output_weights": True, **saved}
        for name in _SHAPE_FIELDS:
            if saved.get(name) != wanted[name]:
                theirs = shown(saved.get(name))
                raise CheckpointError(
                    f"{folder}: checkpoint of another model: {name}={theirs} there but {wanted[name]} here; "
                    "use the config that is saved beside it"
                )

    def _begin(self, root: Path, iteration: int, sharded: dict[str, Any]) -> Path:
        own = sum(
            s.data.nbytes
            for s in nested_values(sharded)
            if isinstance(s, ShardedTensor) and s.data is not None and _writes(s)
        )
        (total,) = self.session.summed(own)
        self._on_save_rank(lambda: folders.begin(root, iteration, int(total * 1.02) + 1_000_000))
        final = folders.folder_of(root, iteration)
        return final.with_name(final.name + ".incomplete")

    def _write(self, sharded: dict[str, Any], working: Path, strategy: SaveSummed) -> AsyncRequest | None:
        return dist_checkpointing.save(
            sharded,
            str(working),
            strategy,
            async_sharded_save=self.config.checkpoint.async_save,
            content_metadata=dict(SHARDING),
        )

    def _finalize(self) -> None:
        assert self._pending is not None
        request, working, publish = self._pending
        self._pending = None
        with self._writing(working):
            for function in request.finalize_fns:
                function()
        publish()

    @contextlib.contextmanager
    def _writing(self, working: Path) -> Iterator[None]:
        """Turn a failure to write into one line, and remove the half-written folder."""
        try:
            yield
        except _FAILURES as error:
            if self.session.is_save_rank:
                shutil.rmtree(working, ignore_errors=True)
            if _is_of_a_peer(error):
                raise
            raise CheckpointError(
                f"--save {self.config.checkpoint.save}: writing failed ({_reason(error)}); "
                "check that the disk has space; the previous checkpoint stays"
            ) from None
        except CheckpointError:
            if self.session.is_save_rank:
                shutil.rmtree(working, ignore_errors=True)
            raise

    def _read(self, wanted: dict[str, Any], folder: Path, index: CheckpointIndex) -> dict[str, Any]:
        try:
            return load_sharded(wanted, folder, index)
        except (*_FAILURES, KeyError, EOFError) as error:
            if _is_of_a_peer(error):
                raise
            raise CheckpointError(
                f"{folder}: cannot be loaded ({_reason(error)}); load an earlier checkpoint"
            ) from None

    def _verify(self, folder: Path) -> None:
        """Check the checksums of a checkpoint's files, each rank a share of them. Collective over the world."""
        wrong: list[str | None] = [None] * self.session.world_size
        try:
            own = check_share(folder, self.session.rank, self.session.world_size)
            own = own and f"{folder}: {own}; copy it again or load an earlier checkpoint"
        except CheckpointError as error:
            own = str(error)
        torch.distributed.all_gather_object(wrong, own)
        line = next((each for each in wrong if each), None)
        if line:
            raise CheckpointError(line)

    def _sums_of(self, attachments: Mapping[str, bytes]) -> dict[str, Summed]:
        """Checksums of all ranks' attachments on rank 0 (empty elsewhere). Collective over the world."""
        own = {name: sum_bytes(contents) for name, contents in attachments.items()}
        gathered: list[dict[str, Summed]] | None = (
            [{} for _ in range(self.session.world_size)] if self.session.is_save_rank else None
        )
        torch.distributed.gather_object(own, gathered)
        return {name: each for of_rank in gathered or [] for name, each in of_rank.items()}

    def _agreed_step_count(self) -> int:
        return int(self.session.largest(optimizer_step_count(self.engine)))

    def _on_save_rank(self, action: Callable[[], object]) -> None:
        """Run ``action`` on rank 0; its RingError or OSError is raised on every rank. Collective over the
        world.
        """
        message: list[str | None] = [None]
        if self.session.is_save_rank:
            try:
                action()
            except CheckpointError as error:
                message = [str(error)]
            except (OSError, SafetensorError) as error:
                message = [f"--save {self.config.checkpoint.save}: {error}; the previous checkpoint stays"]
        torch.distributed.broadcast_object_list(message, src=0)
        if message[0] is not None:
            raise CheckpointError(message[0])


def _reason(error: BaseException) -> str:
    """The error's first line; of torch's CheckpointException, which has one error per rank, that of the first rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _is_of_a_peer(error: BaseException) -> bool:
    """Does the error follow from the end of another rank, rather than from a file or disk here?"""
    return not isinstance(error, ConnectionError) and follows_from_another(error)


def _shape_of(model: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(model).items() if name in _SHAPE_FIELDS}


def _writes(tensor: ShardedTensor) -> bool:
    replica = tensor.replica_id
    return not any(replica) if isinstance(replica, tuple) else replica == 0
