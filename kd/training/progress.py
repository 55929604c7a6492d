"""The progress of a training: one bar per run, or a line every few seconds where there is no terminal."""

import math
import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from kd.metrics import ACCURACY, logged_as, metric_title
from kd.training.callbacks import Throughput, current_metrics

_LINE_SECONDS = 20.0
_BAR_WIDTH = 6
_TIME_WIDTH = len("0:00:00 left") + 3


class PhaseProgress(Callback):
    """Shows epoch, loss, accuracy or another metric, speed and remaining time.

    It is a bar in a terminal, and elsewhere a line every 20 seconds.
    """

    def __init__(
        self, title: str, console: Console, throughput: Throughput, max_steps: int | None, *, metric: str = ACCURACY
    ) -> None:
        self.title = title
        self._measured = logged_as(metric)
        self._format = f"val {'acc' if metric == ACCURACY else metric_title(metric)} {{:.3f}}"
        self.console = console
        self.max_steps = max_steps
        self._throughput = throughput
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self._last_line = time.monotonic()
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        one_line = Column(no_wrap=True, overflow="ellipsis")
        columns = (
            TextColumn("{task.description}", table_column=one_line, markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=_BAR_WIDTH)),
            TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True), markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._bar = Progress(*columns, console=self.console, refresh_per_second=4, expand=True, transient=True)
        total = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
        if self.max_steps is not None:
            total = min(total, self.max_steps * trainer.accumulate_grad_batches)
        done = trainer.fit_loop.total_batch_idx + 1
        self._task = self._bar.add_task(self.title, total=total, completed=done, state="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar, or print a line if it is time."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, state=self._bar_state(trainer))
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._print_line(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation accuracy; after the last epoch, a line replaces the bar."""
        if trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop:
            self._close()
            self._print_line(trainer)
        elif self._bar is not None:
            self._bar.update(self._task, state=self._bar_state(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar before a message is written."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print_line(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self.console.print(" · ".join([self.title, *self._state(trainer).values()]))
        self._last_line = time.monotonic()

    def _bar_state(self, trainer: Trainer) -> str:
        """Return as much of the state as fits beside title, bar and time in one line."""
        state = self._state(trainer)
        width = self.console.width - len(self.title) - _BAR_WIDTH - _TIME_WIDTH
        for name in ("train/acc", "train/loss", "speed", self._measured):
            if len(" · ".join(state.values())) > width:
                state.pop(name, None)
        return " · ".join(state.values())

    def _epochs(self, trainer: Trainer) -> int:
        """Return the number of epochs, the last of which may end early at ``max_steps``."""
        epochs = trainer.max_epochs or 1
        if self.max_steps is None:
            return epochs
        steps_per_epoch = math.ceil(int(trainer.num_training_batches) / trainer.accumulate_grad_batches)
        return min(epochs, math.ceil(self.max_steps / steps_per_epoch))

    def _state(self, trainer: Trainer) -> dict[str, str]:
        metrics = current_metrics(trainer)
        formats = {"train/loss": "loss {:.3f}", "train/acc": "train acc {:.3f}", self._measured: self._format}
        return (
            {"epoch": f"epoch {trainer.current_epoch + 1}/{self._epochs(trainer)}"}
            | {name: text.format(metrics[name]) for name, text in formats.items() if name in metrics}
            | {"speed": f"{self._throughput.images_per_second:,.0f} img/s"}
        )
