"""What is watched while a network trains: its speed, and the images that it is shown."""

import time
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from kd.data import UNLABELED, Batches


class Throughput(Callback):
    """Images a second in training, over all processes, without the time of validation; logged each epoch."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self._wall_before = 0.0
        self._wall_start = time.perf_counter()
        self._epoch_images = 0
        self._epoch_start = 0.0
        self._last_batch_end = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training goes on with."""
        return {"images": self.images, "seconds": self.seconds, "wall_seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was counted before."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]
        self._wall_before = state_dict["wall_seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, as a resumed epoch does not begin once more."""
        self.on_train_epoch_start(trainer, pl_module)

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
        if trainer.logger is not None:
            speed = {"images_per_second": self._epoch_images / max(seconds, 1e-9)}
            trainer.logger.log_metrics(speed, step=trainer.global_step - 1)

    @property
    def wall_seconds(self) -> float:
        """The time of the training, validation included, with that before it was resumed."""
        return self._wall_before + time.perf_counter() - self._wall_start

    @property
    def images_per_second(self) -> float:
        """The speed over the whole of the training."""
        return self.images / max(self.seconds, 1e-9)


class StopAfter(Callback):
    """Ends a training after so many steps, within an epoch too, with a validation.

    Lightning's own ``max_steps`` would end without one, and would not resume as it began.

    Args:
        steps: Optimizer steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Ask for no more where all were made before."""
        trainer.should_stop = trainer.global_step >= self.steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Ask for a stop, before which Lightning validates."""
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


class EachEpoch(Callback):
    """Tells somebody the accuracy on the validation images after each epoch.

    Args:
        tell: Called in the first process with the epoch, counted from 0, and the accuracy, a fraction of 1. What it
            raises ends the training.
    """

    def __init__(self, tell: Callable[[int, float], object]) -> None:
        self.tell = tell

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Tell it, after the epoch's validation."""
        if trainer.is_global_zero:
            self.tell(trainer.current_epoch, float(trainer.callback_metrics["val/acc"]))


class TrainingImages(Callback):
    """A picture of the first augmented training images with their labels, in TensorBoard."""

    def __init__(self, *, count: int = 16) -> None:
        self.count = count

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Draw it."""
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger) or data is None:
            return
        if trainer.global_step:
            # A training that is resumed drew it when it began.
            return
        trainer.logger.experiment.add_image("train/images", draw_views(data, count=self.count), 0)


def draw_views(data: Batches, *, count: int = 16) -> Tensor:
    """Draw the first views of the first epoch, each over the name of its class.

    Args:
        data: The images.
        count: How many.

    Returns:
        ``(3, H, W)``, uint8.
    """
    # Small images are enlarged, pixel by pixel, so that their labels can be read.
    scale = max(1, 96 // data.image_size)
    tiles = [_captioned(pixels, label, data.splits.classes, scale) for pixels, label in data.first_views(count)]
    picture: Tensor = make_grid(tiles, nrow=4)
    return picture


def _captioned(pixels: Tensor, label: int, classes: tuple[str, ...], scale: int) -> Tensor:
    font = ImageFont.load_default(size=13)
    picture = to_pil_image(pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2))
    tile = Image.new("RGB", (picture.width, picture.height + 18), "white")
    tile.paste(picture)
    name = "(no label)" if label == UNLABELED else classes[label]
    ImageDraw.Draw(tile).text((3, picture.height + 1), name, fill="black", font=font)
    drawn: Tensor = pil_to_tensor(tile)
    return drawn
