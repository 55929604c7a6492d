"""Interrupting a run at any moment, and resuming it to the same result bit for bit.

``last.ckpt`` holds the state of a run, each part under the name of the object that restores it:

- weights (including adapters and the trained weights behind an average), optimizer, schedule and progress of the loops:
  Lightning, with :meth:`kd.training.ClassifierModule.on_load_checkpoint`;
- sums of metrics, the history of epochs, elapsed time: ``state_dict`` of the callbacks;
- the position within the epoch: ``state_dict`` of the training loader, :class:`kd.data.batches.ResumableLoader`;
- randomness has no state: each step seeds its own draws (:meth:`kd.training.ClassifierModule.on_train_batch_start`),
  and a view is a function of seed, epoch and image.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from kd.errors import Interrupted
from kd.models import read_plain

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAVE_SECONDS = 30.0


class Interruption:
    """Whether this process received SIGTERM or SIGINT (Ctrl-C).

    During training, the signal is handled at the end of the step, after a checkpoint is saved. At any other time, and
    when a second signal arrives, the program ends at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_deferred = False
        self._is_listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the block; only in the main thread, as Python allows no handlers elsewhere."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def replace_lightning_handlers(self) -> None:
        """Remove Lightning's handlers, which would end a validation at once without saving."""
        if self._is_listening:
            for number in _SIGNALS:
                signal.signal(number, self._receive)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Leave signals inside the block to the training, which checks ``received`` after each step.

        Before the first step, Lightning handles SIGTERM by a ``SystemExit`` without a status, which looks like success;
        it becomes an ``Interrupted``.
        """
        self._is_deferred = True
        try:
            yield
        except SystemExit:
            if self.received is None:
                raise
            self.stop(None)
        finally:
            self._is_deferred = False

    def stop(self, saved: Path | str | None) -> None:
        """Raise ``Interrupted`` with the path of the saved progress, if any."""
        received = self.received or signal.SIGTERM
        progress = "nothing to save" if saved is None else f"saved in {saved}"
        raise Interrupted(f"stopped by {received.name}: {progress}", received=int(received))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_second = self.received is not None
        self.received = signal.Signals(number)
        if is_second or not self._is_deferred:
            self.stop(None)


@dataclass(frozen=True)
class ResumeOptions:
    """How a run is saved and resumed.

    Args:
        checkpoint: The checkpoint to resume from, see :func:`newest_checkpoint`; ``None`` starts from the beginning.
        save_every: Optimizer steps between two saves of ``last.ckpt``; ``None``: after each epoch, at most once in 30
            seconds, and at the end of training.
        interruption: Whether to stop, checked after each step.
    """

    checkpoint: Path | None = None
    save_every: int | None = None
    interruption: Interruption = field(default_factory=Interruption)

    @property
    def first_step(self) -> int:
        """Number of optimizer steps before the checkpoint; a logger replaces its events from this step on."""
        return 0 if self.checkpoint is None else steps_in(self.checkpoint)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint to resume from: ``last.ckpt``, or a newer one that Lightning saved for SLURM, or none."""
    last = folder / LAST_CHECKPOINT
    saved = [*([last] if last.is_file() else []), *sorted(folder.glob("hpc_ckpt_*.ckpt"), reverse=True)]
    # max prefers the first of equal steps: last.ckpt is from the end of a step, the other from anywhere within it.
    return max(saved, key=steps_in) if len(saved) > 1 else next(iter(saved), None)


def steps_in(path: Path) -> int:
    """Return the number of optimizer steps before a checkpoint."""
    return int(read_plain(path, mapped=True)["global_step"])


class LastCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` at the end of a step or after an epoch's validation, and stops after a signal."""

    def __init__(self, folder: Path | None, options: ResumeOptions) -> None:
        self.folder = folder
        self.save_every = options.save_every
        self.interruption = options.interruption
        self._saved_at = time.monotonic()
        self._requeue: Callable[..., object] | None = None
        self._must_requeue = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Use the first process's folder: other processes start later, and may count one version more."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and defer SLURM's signal, which Lightning would handle at once, to the end of the step."""
        self._saved_at = time.monotonic()
        self.interruption.replace_lightning_handlers()
        handler = signal.getsignal(signal.SIGUSR1)
        if SLURMEnvironment.detect() and callable(handler):
            self._requeue = handler
            signal.signal(signal.SIGUSR1, self._defer_requeue)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every ``save_every`` steps and after a signal; an epoch's last step is followed by its validation."""
        is_last = trainer.should_stop or batch_idx + 1 == trainer.num_training_batches
        if is_last or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        in_any_process = trainer.strategy.reduce_boolean_decision
        stops = in_any_process(self.interruption.received is not None, all=False)
        requeues = self._requeue is not None and in_any_process(self._must_requeue, all=False)
        is_due = self.save_every is not None and trainer.global_step % self.save_every == 0
        saved = self._save(trainer) if stops or requeues or is_due else None
        if requeues and self._requeue is not None:
            self._must_requeue = False
            self._requeue(signal.SIGUSR1, None)
        if stops:
            self.interruption.stop(saved)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the epoch's validation."""
        in_any_process = trainer.strategy.reduce_boolean_decision
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        stops = not is_last and in_any_process(self.interruption.received is not None, all=False)
        is_due = self.save_every is not None or time.monotonic() - self._saved_at >= _SAVE_SECONDS
        saved = self._save(trainer) if is_last or stops or in_any_process(is_due, all=False) else None
        if stops:
            self.interruption.stop(saved)

    def _save(self, trainer: Trainer) -> Path | None:
        if self.folder is None:
            return None
        # A resumed run doesn't log earlier steps again.
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.folder / LAST_CHECKPOINT)
        self._saved_at = time.monotonic()
        return self.folder / LAST_CHECKPOINT

    def _defer_requeue(self, number: int, frame: FrameType | None) -> None:
        self._must_requeue = True
