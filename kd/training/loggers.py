"""Loggers: TensorBoard in a run's folder, and what every Lightning logger is given, each as far as it can show it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from kd.data import UNLABELED, Batches


class RunTensorBoard(TensorBoardLogger):
    """TensorBoard events in a given folder, without the curve of the epoch number that Lightning adds to all others.

    Args:
        folder: The run's folder.
        purge_step: Events of an earlier part of the run from this step on are replaced, as when it is resumed.
    """

    def __init__(self, folder: Path, *, purge_step: int = 0) -> None:
        super().__init__(str(folder), name="", version="", default_hp_metric=False, purge_step=purge_step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all metrics but the epoch."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def log_image(logger: Logger, tag: str, image: Tensor, step: int) -> None:
    """Log an image, or nothing where a logger shows none.

    Args:
        logger: Any Lightning logger. It shows images if it has a ``log_image(key=, images=, step=)``, as Weights &
            Biases' has, or an ``experiment.add_image(tag, image, step)``, as TensorBoard's has.
        tag: Its name, such as ``train/images``.
        image: ``(3, H, W)``, uint8.
        step: Number of optimizer steps taken.
    """
    if hasattr(logger, "log_image"):
        logger.log_image(key=tag, images=[to_pil_image(image)], step=step)
        return
    add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
    if add_image is not None:
        add_image(tag, image, step)


def log_hyperparameters(logger: Logger, hyperparameters: Mapping[str, Any]) -> None:
    """Log hyperparameters; lists as text, and none that is ``None``, as TensorBoard shows numbers and text only."""
    logger.log_hyperparams(_plain(hyperparameters))


def log_result(logger: Logger, hyperparameters: Mapping[str, Any], metrics: dict[str, float], step: int) -> None:
    """Log final metrics beside the hyperparameters that led to them, in TensorBoard's HPARAMS tab.

    The tab shows the last value of a curve: that of the last epoch, if ``step`` is the curve's last. Other loggers
    combine hyperparameters and curves by themselves.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(_plain(hyperparameters), metrics=metrics, step=step)


class TrainingImages(Callback):
    """Logs an image of the first augmented training images with their labels.

    Args:
        count: Number of images.
    """

    def __init__(self, *, count: int = 16) -> None:
        self.count = count

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Log it once: a resumed run logged it when it began."""
        data = getattr(trainer, "datamodule", None)
        if trainer.is_global_zero and trainer.loggers and isinstance(data, Batches) and not trainer.global_step:
            image = draw_views(data, count=self.count)
            for logger in trainer.loggers:
                log_image(logger, "train/images", image, 0)


def draw_views(data: Batches, *, count: int = 16) -> Tensor:
    """Draw the first views of the first epoch in a grid, each above the name of its class.

    Args:
        data: The images.
        count: Number of views.

    Returns:
        ``(3, H, W)``, uint8.
    """
    # Small images are enlarged pixel by pixel, so that their labels can be read.
    scale = max(1, 96 // data.image_size)
    tiles = [_captioned(pixels, label, data.splits.classes, scale) for pixels, label in data.first_views(count)]
    grid: Tensor = make_grid(tiles, nrow=4)
    return grid


def _captioned(pixels: Tensor, label: int, classes: tuple[str, ...], scale: int) -> Tensor:
    view = to_pil_image(pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2))
    tile = Image.new("RGB", (view.width, view.height + 18), "white")
    tile.paste(view)
    name = "(no label)" if label == UNLABELED else classes[label]
    font = ImageFont.load_default(size=13)
    ImageDraw.Draw(tile).text((3, view.height + 1), name, fill="black", font=font)
    captioned: Tensor = pil_to_tensor(tile)
    return captioned


def _plain(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in hyperparameters.items()
        if value is not None
    }
