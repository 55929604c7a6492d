"""Checkpoints: written so that a machine may die at any moment, and read so that nothing in them runs."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from kd.errors import UserError
from kd.models import read_plain
from kd.training.interruption import Interruption

_LAST = Path("checkpoints") / "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
_SELDOM = 30.0
"""Seconds between two checkpoints at the ends of short epochs, where nobody says how often."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a file beside its place and moves it there when it is on the disk; reads plain values and tensors only.

    The best weights are held back where epochs are short: they are written once half a minute has gone by, before any
    other checkpoint, so that none tells of better ones than there are, and at the end, that of an exception too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: tuple[Path, dict[str, Any]] | None = None
        self._best_at = time.monotonic()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ANN401, ARG002 (Lightning's signature)
        """Write a checkpoint: the old file stays until the new one is whole, through a power loss too.

        Raises:
            UserError: If it can't be written, such as on a full disk.
        """
        place = Path(path)
        if place.name == BEST_CHECKPOINT:
            self._held = (place, checkpoint)
            if time.monotonic() - self._best_at >= _SELDOM:
                self._write_held()
            else:
                # Training goes on, and changes its weights where they lie.
                copied = apply_to_collection(checkpoint, torch.Tensor, lambda one: one.detach().to("cpu", copy=True))
                self._held = (place, copied)
            return
        self._write_held()
        self._write(checkpoint, place)

    def teardown(self) -> None:
        """Write what is held back."""
        self._write_held()

    def _write_held(self) -> None:
        if self._held is not None:
            place, checkpoint = self._held
            try:
                self._write(checkpoint, place)
            except UserError:
                # It does not fit, and will not the next time.
                self._held = None
                raise
            self._held, self._best_at = None, time.monotonic()

    def _write(self, checkpoint: dict[str, Any], place: Path) -> None:
        beside = place.with_name(f"{place.name}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(place)
            _sync_folder(place.parent)
        except (OSError, RuntimeError) as error:
            # torch's writer tells of a full disk in a RuntimeError of its own.
            with contextlib.suppress(OSError):
                beside.unlink()
            before = f"; the one before it is whole: {place}" if place.is_file() else ""
            raise UserError(f"the checkpoint {place} can't be written: {_reason(error)}{before}") from error

    def load_checkpoint(
        self,
        path: Any,  # noqa: ANN401
        map_location: Any = None,  # noqa: ANN401, ARG002
        weights_only: bool | None = None,  # noqa: ARG002, FBT001
    ) -> dict[str, Any]:
        """Read a checkpoint, with ``weights_only=True`` whatever is asked for.

        Raises:
            UserError: If it can't be read, or holds more than plain values and tensors.
        """
        checkpoint: dict[str, Any] = read_plain(Path(path))
        return checkpoint


@dataclass(frozen=True)
class Persistence:
    """How a training outlives the machine that it runs on.

    Args:
        every: Steps between two checkpoints to go on from; ``None``: at the ends of epochs, not more often than every
            half minute, and at the last one.
        interruption: Where to look whether to stop.
        begun: The version's folder of a training that was cut off: it goes on from its last checkpoint, to the very
            end that it would have come to, or begins once more where it has none. ``None``: a new version.
        on_begin: Called by the first process with the version's folder, before the first step.
    """

    every: int | None = None
    interruption: Interruption = field(default_factory=Interruption)
    begun: Path | None = None
    on_begin: Callable[[Path], object] | None = None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from: the last one, or one that Lightning wrote since, when SLURM told it to."""
        if self.begun is None:
            return None
        last = self.begun / _LAST
        written = [*([last] if last.is_file() else []), *sorted(self.begun.glob("hpc_ckpt_*.ckpt"), reverse=True)]
        # Of two with the same step the first counts: ours stands at the end of a step, the other one anywhere in it.
        return max(written, key=steps_in) if len(written) > 1 else next(iter(written), None)

    @property
    def logging(self) -> dict[str, Any]:
        """What TensorBoard's logger needs: which version, and which steps are drawn again."""
        if self.begun is None:
            return {}
        checkpoint = self.checkpoint
        first = 0 if checkpoint is None else steps_in(checkpoint)
        return {"version": int(self.begun.name.removeprefix("version_")), "purge_step": first}


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a training goes on to the very end that it would have come to.

    It is written at the end of a step, or of an epoch after its validation.

    Args:
        persistence: How often, and where to look whether to stop.
    """

    def __init__(self, persistence: Persistence) -> None:
        self.every = persistence.every
        self.interruption = persistence.interruption
        self._saved_at = time.monotonic()
        self._requeue: Callable[..., object] | None = None
        self._is_to_requeue = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Start the clock, and let SLURM's signal wait for the end of the step, where Lightning answers it."""
        self._saved_at = time.monotonic()
        self.interruption.take_over()
        handler = signal.getsignal(signal.SIGUSR1)
        if SLURMEnvironment.detect() and callable(handler):
            self._requeue = handler
            signal.signal(signal.SIGUSR1, self._note_requeue)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        """Save after so many steps, and when asked to stop: but for an epoch's last step, which validation follows."""
        is_last = trainer.should_stop or batch_idx + 1 == trainer.num_training_batches
        if is_last or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stops, requeues = self._is_asked_to_stop(trainer), self._is_asked_to_requeue(trainer)
        if stops or requeues or (self.every is not None and trainer.global_step % self.every == 0):
            self._save(trainer)
        if requeues and self._requeue is not None:
            self._is_to_requeue = False
            self._requeue(signal.SIGUSR1, None)
        if stops:
            self.interruption.stop(self.path(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save after an epoch."""
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        stops = self._is_asked_to_stop(trainer) and not is_last
        seldom = self.every is None and time.monotonic() - self._saved_at < _SELDOM
        if is_last or stops or not trainer.strategy.reduce_boolean_decision(seldom):
            self._save(trainer)
        if stops:
            self.interruption.stop(self.path(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Let the best weights be written now: not every strategy ends in peace, nor tells its writer."""
        if trainer.is_global_zero:
            trainer.strategy.checkpoint_io.teardown()

    def path(self, trainer: Trainer) -> str:
        """Return where it is."""
        return str(Path(str(trainer.log_dir)) / _LAST)

    def _save(self, trainer: Trainer) -> None:
        # What a resumed training does not draw again must be there.
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.flush()
        trainer.save_checkpoint(self.path(trainer))
        self._saved_at = time.monotonic()

    def _note_requeue(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a handler's signature)
        self._is_to_requeue = True

    def _is_asked_to_stop(self, trainer: Trainer) -> bool:
        return _any(trainer, self.interruption.received is not None)

    def _is_asked_to_requeue(self, trainer: Trainer) -> bool:
        return self._requeue is not None and _any(trainer, self._is_to_requeue)


def _any(trainer: Trainer, asked: bool) -> bool:  # noqa: FBT001 (what is reduced)
    """Say whether any process is asked: one that is asks them all, at the same step."""
    return asked if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(asked, all=False)


def steps_in(path: Path) -> int:
    """Return how many optimizer steps were made before a checkpoint.

    Raises:
        UserError: If it can't be read.
    """
    return int(read_plain(path, mapped=True)["global_step"])


def _sync_folder(folder: Path) -> None:
    """Let the disk know the file's new name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return cause.strerror or str(cause) if isinstance(cause, OSError) else str(cause).splitlines()[0]
