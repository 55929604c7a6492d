"""Interrupting a run at any moment, and resuming it to the same result bit for bit.

``last.ckpt`` holds all that a resumed run needs, each part under the name of whoever restores it:

- weights (those of the adapters and the trained weights behind an average included), optimizer, schedule and progress
  of the loops: Lightning, with :meth:`kd.training.ClassifierModule.on_load_checkpoint`;
- sums of metrics, the history of epochs, the time spent: ``state_dict`` of the callbacks;
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
"""Least seconds between two saves at the ends of epochs, where no number of steps is given."""


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
        """Handle signals alone from now on: Lightning would leave a validation at once, with nothing saved."""
        if self._is_listening:
            for number in _SIGNALS:
                signal.signal(number, self._receive)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Leave signals to the training inside the block, which checks ``received`` after each step.

        Raises:
            Interrupted: If Lightning exits first, as it does before the first step: it answers SIGTERM with an exit
                without a message that looks like success.
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

    def stop(self, saved: str | None) -> None:
        """End the program.

        Args:
            saved: The checkpoint to resume from, or ``None``.

        Raises:
            Interrupted: Always.
        """
        received = self.received or signal.SIGTERM
        raise Interrupted(
            f"stopped by {received.name}: {'nothing to save' if saved is None else f'saved in {saved}'}",
            received=int(received),
        )

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a handler's signature)
        is_second = self.received is not None
        self.received = signal.Signals(number)
        if is_second or not self._is_deferred:
            self.stop(None)


@dataclass(frozen=True)
class ResumeOptions:
    """How a run is saved and resumed.

    Args:
        checkpoint: The checkpoint to resume from, see :func:`newest_checkpoint`; ``None`` starts from the beginning.
        save_every: Optimizer steps between two saves of ``last.ckpt``; ``None``: at the ends of epochs, at most once in
            30 seconds, and at the end of training.
        interruption: Whether to stop, checked after each step.
    """

    checkpoint: Path | None = None
    save_every: int | None = None
    interruption: Interruption = field(default_factory=Interruption)

    @property
    def first_step(self) -> int:
        """Number of optimizer steps taken before: a logger's events from this step on are to be replaced."""
        return 0 if self.checkpoint is None else steps_in(self.checkpoint)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that a run in ``folder`` resumes from: ``last.ckpt``, or a newer one that SLURM ordered.

    Returns:
        Its path, or ``None`` where nothing was saved yet.

    Raises:
        UserError: If one of several can't be read.
    """
    last = folder / LAST_CHECKPOINT
    saved = [*([last] if last.is_file() else []), *sorted(folder.glob("hpc_ckpt_*.ckpt"), reverse=True)]
    # Of two with the same step the first counts: last.ckpt is from the end of a step, the other from anywhere in it.
    return max(saved, key=steps_in) if len(saved) > 1 else next(iter(saved), None)


def steps_in(path: Path) -> int:
    """Return the number of optimizer steps taken before a checkpoint.

    Raises:
        UserError: If it can't be read.
    """
    return int(read_plain(path, mapped=True)["global_step"])


class LastCheckpoint(Checkpoint):
    """Saves ``last.ckpt``, at the end of a step or after an epoch's validation, and stops after a signal.

    Args:
        folder: The run's folder; ``None``: nothing is saved.
        options: How often, and what interrupts.

    Attributes:
        folder: That of the first process, which is the one that writes.
    """

    def __init__(self, folder: Path | None, options: ResumeOptions) -> None:
        self.folder = folder
        self.save_every = options.save_every
        self.interruption = options.interruption
        self._saved_at = time.monotonic()
        self._requeue: Callable[..., object] | None = None
        self._must_requeue = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Agree on the folder: other processes start later, and may count one version more."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Start the clock, and defer SLURM's signal, which Lightning would answer at once, to the end of the step."""
        self._saved_at = time.monotonic()
        self.interruption.replace_lightning_handlers()
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
        """Save every ``save_every`` steps and after a signal; an epoch's last step is followed by its validation."""
        is_last = trainer.should_stop or batch_idx + 1 == trainer.num_training_batches
        if is_last or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stops = _in_any_process(trainer, self.interruption.received is not None)
        requeues = self._requeue is not None and _in_any_process(trainer, self._must_requeue)
        if stops or requeues or (self.save_every is not None and trainer.global_step % self.save_every == 0):
            self._save(trainer)
        if requeues and self._requeue is not None:
            self._must_requeue = False
            self._requeue(signal.SIGUSR1, None)
        if stops:
            self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save after the epoch's validation."""
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        stops = not is_last and _in_any_process(trainer, self.interruption.received is not None)
        is_early = self.save_every is None and time.monotonic() - self._saved_at < _SAVE_SECONDS
        if is_last or stops or not trainer.strategy.reduce_boolean_decision(is_early):
            self._save(trainer)
        if stops:
            self._stop()

    def _save(self, trainer: Trainer) -> None:
        if self.folder is not None:
            # A resumed run doesn't log earlier steps again.
            for logger in trainer.loggers:
                logger.save()
            trainer.save_checkpoint(self.folder / LAST_CHECKPOINT)
            self._saved_at = time.monotonic()

    def _stop(self) -> None:
        self.interruption.stop(None if self.folder is None else str(self.folder / LAST_CHECKPOINT))

    def _note_requeue(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a handler's signature)
        self._must_requeue = True


def _in_any_process(trainer: Trainer, condition: bool) -> bool:  # noqa: FBT001 (what is reduced)
    """Return whether a condition holds in any process, so that all act on it at the same step."""
    return condition if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(condition, all=False)
