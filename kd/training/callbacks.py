"""What is watched while a network trains: its speed, the images it is shown, how far it is."""

import time
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from kd.data import EpochSampler, ImageData


class Throughput(Callback):
    """Images a second in training, over all processes, without the time of validation; logged each epoch."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self._epoch_images = 0
        self._epoch_start = 0.0
        self._last_batch_end = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Start the clock."""
        self._epoch_images = 0
        self._epoch_start = self._last_batch_end = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Count the batch."""
        self._epoch_images += len(batch[1]) * trainer.world_size
        self._last_batch_end = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Log the epoch's speed."""
        seconds = self._last_batch_end - self._epoch_start
        self.images += self._epoch_images
        self.seconds += seconds
        pl_module.log("images_per_second", self._epoch_images / max(seconds, 1e-9), rank_zero_only=True)

    @property
    def images_per_second(self) -> float:
        """The speed over the whole of the training."""
        return self.images / max(self.seconds, 1e-9)


class TrainingImages(Callback):
    """A picture of the first augmented training images with their labels, in TensorBoard."""

    def __init__(self, *, count: int = 16) -> None:
        self.count = count

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Draw it."""
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger) or data is None:
            return
        trainer.logger.experiment.add_image("train/images", draw_views(data, count=self.count), 0)


def draw_views(data: ImageData, *, count: int = 16) -> Tensor:
    """Draw the first views of the first epoch, each over the name of its class.

    Args:
        data: The images.
        count: How many.

    Returns:
        ``(3, H, W)``, uint8.
    """
    which = list(EpochSampler(data.train_indices, seed=data.seed))[:count]
    # Small images are enlarged, pixel by pixel, so that their labels can be read.
    scale = max(1, 96 // data.image_size)
    return make_grid([_captioned(*data.train_views[one], data.splits.classes, scale) for one in which], nrow=4)


def _captioned(pixels: Tensor, label: int, classes: tuple[str, ...], scale: int) -> Tensor:
    font = ImageFont.load_default(size=13)
    picture = to_pil_image(pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2))
    tile = Image.new("RGB", (picture.width, picture.height + 18), "white")
    tile.paste(picture)
    ImageDraw.Draw(tile).text((3, picture.height + 1), classes[label], fill="black", font=font)
    return pil_to_tensor(tile)


class PhaseProgress(Callback):
    """One bar for the whole of a phase: epoch, loss, accuracy, images a second, the time left.

    Where the output is no terminal, a line every few seconds takes the bar's place.

    Args:
        title: What is trained.
        console: Where to write.
        line_seconds: Seconds between lines where there is no terminal.
    """

    def __init__(self, title: str, *, console: Console | None = None, line_seconds: float = 10.0) -> None:
        self.title = title
        self.console = console or Console()
        self.line_seconds = line_seconds
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._speed = _Speed()
        self._last_line = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
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
        self._task = self._bar.add_task(self.title, total=_total_batches(trainer), state="")
        self._bar.start()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Move the bar."""
        self._speed.count(len(batch[1]) * trainer.world_size)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, state=self._state(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Stop the clock of the training's speed."""
        self._speed.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Write the line that takes the bar's place."""
        now = time.monotonic()
        is_last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        if self._bar is not None:
            self._bar.update(self._task, state=self._state(trainer))
        elif trainer.is_global_zero and (is_last or now - self._last_line >= self.line_seconds):
            self.console.print(f"{self.title}: {self._state(trainer)}", highlight=False)
            self._last_line = now

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

    def _state(self, trainer: Trainer) -> str:
        metrics = trainer.callback_metrics
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        for key, words in (("train/loss", "loss {:.3f}"), ("train/acc", "acc {:.3f}"), ("val/acc", "val acc {:.3f}")):
            if key in metrics:
                parts.append(words.format(float(metrics[key])))
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
            if self._seconds > 5:
                self._images, self._seconds = self._images // 2, self._seconds / 2
        self._last = now

    def pause(self) -> None:
        self._last = None


def _total_batches(trainer: Trainer) -> int:
    total = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
    in_steps = trainer.max_steps * trainer.accumulate_grad_batches
    return min(total, in_steps) if trainer.max_steps > 0 else total


def cpu_float(value: Tensor | None) -> float | None:
    """Return a metric as a number, or ``None`` where it was not measured."""
    return None if value is None else float(value.detach().to(torch.float64))
