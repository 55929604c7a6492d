"""The progress of a training: one bar per run, or a line every few seconds where there is no terminal."""

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from kd.console import make_console
from kd.training.callbacks import latest_metrics

_SPEED_SECONDS = 5
"""Length of the window over which the speed is measured."""

_BAR_WIDTH = 6
_TIME_WIDTH = len("0:00:00 left") + 3


class PhaseProgress(Callback):
    """Shows epoch, loss, accuracy, speed and the time left: as a bar in a terminal, elsewhere as a line now and then.

    Args:
        title: Name of the run, such as ``teacher resnet18``.
        console: Where to write.
        line_seconds: Seconds between lines where there is no terminal.
    """

    def __init__(self, title: str, *, console: Console | None = None, line_seconds: float = 20.0) -> None:
        self.title = title
        self.console = console or make_console()
        self.line_seconds = line_seconds
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._speed = _Speed()
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
        done = trainer.fit_loop.total_batch_idx + 1
        self._task = self._bar.add_task(self.title, total=_total_batches(trainer, pl_module), completed=done, state="")
        self._bar.start()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Advance."""
        self._speed.count(len(batch[1]) * trainer.world_size)
        if self._bar is None:
            self._print_line(trainer, pl_module, is_last=False)
        else:
            self._bar.update(self._task, advance=1, state=self._bar_state(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Leave the time of validation out of the speed."""
        self._speed.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation accuracy; after the last epoch, a line replaces the bar."""
        is_last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        if self._bar is not None and not is_last:
            self._bar.update(self._task, state=self._bar_state(trainer, pl_module))
            return
        self._close()
        self._print_line(trainer, pl_module, is_last=is_last)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Remove the bar before a message is written."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print_line(self, trainer: Trainer, pl_module: LightningModule, *, is_last: bool) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and (is_last or now - self._last_line >= self.line_seconds):
            self.console.print(" · ".join([self.title, *self._state(trainer, pl_module).values()]))
            self._last_line = now

    def _bar_state(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return as much of the state as fits beside title, bar and time in one line."""
        state = self._state(trainer, pl_module)
        width = self.console.width - len(self.title) - _BAR_WIDTH - _TIME_WIDTH
        for name in ("train/acc", "train/loss", "speed", "val/acc"):
            if len(" · ".join(state.values())) > width:
                state.pop(name, None)
        return " · ".join(state.values())

    def _state(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        metrics: dict[str, float] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics |= latest_metrics(pl_module)
        formats = {"train/loss": "loss {:.3f}", "train/acc": "train acc {:.3f}", "val/acc": "val acc {:.3f}"}
        return (
            {"epoch": f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"}
            | {name: text.format(metrics[name]) for name, text in formats.items() if name in metrics}
            | {"speed": f"{self._speed.images_per_second:,.0f} img/s"}
        )


class _Speed:
    """Training images per second over the last few seconds."""

    def __init__(self) -> None:
        self.images_per_second = 0.0
        self._images = 0
        self._seconds = 0.0
        self._last: float | None = None

    def count(self, images: int) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._images += images
            self._seconds += now - self._last
            self.images_per_second = self._images / max(self._seconds, 1e-9)
            if self._seconds > _SPEED_SECONDS:
                self._images, self._seconds = self._images // 2, self._seconds / 2
        self._last = now

    def pause(self) -> None:
        self._last = None


def _total_batches(trainer: Trainer, module: LightningModule) -> int:
    total = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
    max_steps = getattr(module, "max_steps", None)
    return total if max_steps is None else min(total, max_steps * trainer.accumulate_grad_batches)
