"""Interrupting a run at any moment, and resuming it to the same result bit for bit.

``last.ckpt`` holds the state of a run, each part under the name of the object that restores it:

- weights (including adapters and the trained weights behind an average), optimizer, schedule and progress of the loops:
  Lightning, with :meth:`kd.training.ClassifierModule.on_load_checkpoint`;
- sums of metrics, the history of epochs, elapsed time: ``state_dict`` of the callbacks;
- the position within the epoch: ``state_dict`` of the training loader, :class:`kd.data.batches.ResumableLoader`;
- randomness has no state: each step seeds its own draws (:meth:`kd.training.ClassifierModule.on_train_batch_start`),
  and a view is a function of seed, epoch and image.
"""

import multiprocessing
import os
import shutil
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
from rich.console import Console

from kd.data import seconds_waited
from kd.errors import DamagedFile, Interrupted, UserError
from kd.files import keep_previous
from kd.models import read_plain

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
PREVIOUS_CHECKPOINT = LAST_CHECKPOINT.with_name("previous.ckpt")

# A terminal that is closed sends SIGHUP.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SAVE_SECONDS = 30.0
_WAIT_SECONDS = 20.0
"""For how long a batch may be waited for after a signal, before the process ends without the end of its step."""


class Interruption:
    """Whether this process received SIGTERM, SIGINT (Ctrl-C) or SIGHUP (a closed terminal).

    During training, the signal is handled at the end of the step, after a checkpoint is saved; at any other time, the
    program ends by an exception. A second signal ends the process at once, with its data-loading workers, and so does
    a wait for a batch that never arrives: files are written atomically, so the last checkpoint stays intact.
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
        if self.received is not None:
            _end_at_once(number, f"stopped by a second {signal.Signals(number).name}")
        self.received = signal.Signals(number)
        if not self._is_deferred:
            self.stop(None)
        threading.Thread(target=self._end_endless_wait, args=(number,), daemon=True).start()

    def _end_endless_wait(self, number: int) -> None:
        """End the process if it waits for a batch in vain, as where its workers are stuck."""
        while self._is_deferred:
            time.sleep(1)
            if seconds_waited() > _WAIT_SECONDS:
                _end_at_once(number, f"stopped by {signal.Signals(number).name} while waiting for images")


def _end_at_once(number: int, message: str) -> None:
    """End the process: an exception could be raised inside torch's writer, and workers ignore an orderly SIGTERM."""
    for child in multiprocessing.active_children():
        child.kill()
    os.write(2, f"{message}; the last checkpoint is intact\n".encode())
    os._exit(128 + number)


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


def newest_checkpoint(folder: Path, console: Console | None = None) -> Path | None:
    """Return the newest intact checkpoint to resume from, or ``None`` if there is none.

    Args:
        folder: The run's folder, with ``last.ckpt``, the one before it, and those that Lightning saves for SLURM.
        console: Where damaged checkpoints are named.
    """
    steps: dict[Path, int] = {}
    for path in (folder / LAST_CHECKPOINT, folder / PREVIOUS_CHECKPOINT, *folder.glob("hpc_ckpt_*.ckpt")):
        if not path.is_file():
            continue
        try:
            steps[path] = steps_in(path)
        except DamagedFile as error:
            if console is not None:
                console.print(f"warning: {error}; resuming from the checkpoint before it")
    # max prefers the first of equal steps: last.ckpt is from the end of a step, SLURM's from anywhere within it.
    return max(steps, key=steps.__getitem__, default=None)


def steps_in(path: Path) -> int:
    """Return the number of optimizer steps before a checkpoint; raise a ``UserError`` if it is damaged."""
    checkpoint = read_plain(path, mapped=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("global_step"), int):
        raise UserError(f"{path}: not a checkpoint of a training")
    return int(checkpoint["global_step"])


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
            if shutil.which("scontrol") is not None:
                self._requeue(signal.SIGUSR1, None)
            elif trainer.is_global_zero:
                where = "not saved" if saved is None else f"saved in {saved}"
                print(  # noqa: T201 (in the job's output)
                    f"SIGUSR1: {where}; the job was not requeued, as there is no scontrol here. Submit it again with "
                    "--resume; training goes on until it is ended.",
                    flush=True,
                )
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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the checkpoint before the last: a finished run isn't resumed."""
        if self.folder is not None and trainer.is_global_zero:
            (self.folder / PREVIOUS_CHECKPOINT).unlink(missing_ok=True)

    def _save(self, trainer: Trainer) -> Path | None:
        if self.folder is None:
            return None
        # A resumed run doesn't log earlier steps again.
        for logger in trainer.loggers:
            logger.save()
        last = self.folder / LAST_CHECKPOINT
        if trainer.is_global_zero:
            keep_previous(last, self.folder / PREVIOUS_CHECKPOINT)
        trainer.save_checkpoint(last)
        self._saved_at = time.monotonic()
        return last

    def _defer_requeue(self, number: int, frame: FrameType | None) -> None:
        self._must_requeue = True
