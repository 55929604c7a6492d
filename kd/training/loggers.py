"""TensorBoard in a run's folder, and a grid of training images for every logger that shows images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from kd.data import UNLABELED, Batches
from kd.training.callbacks import batches_of


class RunTensorBoard(TensorBoardLogger):
    """TensorBoard events in a run's folder, without a curve of the epoch; those from ``purge_step`` on are replaced."""

    def __init__(self, folder: Path, *, purge_step: int = 0) -> None:
        super().__init__(str(folder), name="", version="", default_hp_metric=False, purge_step=purge_step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all metrics but the epoch."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class TrainingImages(Callback):
    """Logs a grid of the first augmented training images with their labels.

    See :func:`show_image`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log it, except in a resumed run."""
        if not trainer.is_global_zero or not trainer.loggers or trainer.global_step:
            return
        image = draw_views(batches_of(trainer))
        for logger in trainer.loggers:
            show_image(logger, "train/images", image)


def show_image(logger: Any, name: str, image: Tensor) -> None:
    """Log an image ``(3, H, W)``, uint8, where a logger shows images.

    It does if it has ``log_image(key=, images=, step=)``, as Weights & Biases',
    ``experiment.add_image(tag, image, step)``, as TensorBoard's, or
    ``experiment.log_image(run_id, image, key=, step=)``, as MLflow's.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[to_pil_image(image)], step=0)
    elif hasattr(experiment, "add_image"):
        experiment.add_image(name, image, 0)
    elif hasattr(experiment, "log_image"):
        experiment.log_image(logger.run_id, to_pil_image(image), key=name, step=0)


def draw_views(data: Batches, *, count: int = 16) -> Tensor:
    """Draw the first views of the first epoch in a grid ``(3, H, W)``, uint8, each above the name of its class."""
    # Small images are enlarged pixel by pixel, so that their labels can be read.
    scale = max(1, 96 // data.image_size)
    font, tiles = ImageFont.load_default(size=13), []
    for pixels, label in data.first_views(count):
        view = to_pil_image(pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2))
        tile = Image.new("RGB", (view.width, view.height + 18), "white")
        tile.paste(view)
        labels = label if isinstance(label, tuple) else () if label == UNLABELED else (label,)
        name = ", ".join(data.splits.classes[each] for each in labels) or "(no label)"
        ImageDraw.Draw(tile).text((3, view.height + 1), name, fill="black", font=font)
        tiles.append(pil_to_tensor(tile))
    grid: Tensor = make_grid(tiles, nrow=4)
    return grid
