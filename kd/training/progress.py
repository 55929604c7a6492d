"""How far a training is: one bar a phase, or a line now and then where there is no terminal."""

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kd.training.modules import ClassifierModule

_SPEED_SECONDS = 5
"""Over about how many seconds the speed is measured."""


class PhaseProgress(Callback):
    """One bar for the whole of a phase: epoch, loss, accuracy, images a second, the time left.

    Where the output is no terminal, a line every few seconds takes the bar's place.

    Args:
        title: What is trained.
        console: Where to write.
        line_seconds: Seconds between lines where there is no terminal.
    """

    def __init__(self, title: str, *, console: Console | None = None, line_seconds: float = 20.0) -> None:
        self.title = title
        self.console = console or Console()
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
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console, refresh_per_second=4, expand=True)
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
        """Move the bar."""
        self._speed.count(len(batch[1]) * trainer.world_size)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, state=self._state(trainer, pl_module))
        else:
            self._write_line(trainer, pl_module, is_last=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Stop the clock of the training's speed."""
        self._speed.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what validation found."""
        if self._bar is not None:
            self._bar.update(self._task, state=self._state(trainer, pl_module))
        else:
            is_last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
            self._write_line(trainer, pl_module, is_last=is_last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Leave the bar as it stands."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Give the terminal back before a message is written."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _write_line(self, trainer: Trainer, pl_module: LightningModule, *, is_last: bool) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and (is_last or now - self._last_line >= self.line_seconds):
            self.console.print(f"{self.title}: {self._state(trainer, pl_module)}", highlight=False, soft_wrap=True)
            self._last_line = now

    def _state(self, trainer: Trainer, pl_module: LightningModule) -> str:
        train_metrics = pl_module.train_metrics if isinstance(pl_module, ClassifierModule) else {}
        metrics: dict[str, float] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics.update(train_metrics)
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        for key, words in (("train/loss", "loss {:.3f}"), ("train/acc", "acc {:.3f}"), ("val/acc", "val acc {:.3f}")):
            if key in metrics:
                parts.append(words.format(metrics[key]))
        return "  ".join([*parts, f"{self._speed.images_per_second:,.0f} images/s"])


class _Speed:
    """Images a second of late: over the last few seconds of training."""

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
