"""Measuring a checkpoint on a folder."""

from pathlib import Path

from kd.data import ImageData, Splits, match_classes, validation_images
from kd.errors import UserError
from kd.models import load_classifier
from kd.pipeline.workers import default_workers
from kd.training import Hardware, PredictionRecorder, evaluate


def evaluate_checkpoint(
    checkpoint: str,
    *,
    dataset: str = "imagefolder",
    data_dir: str | None = None,
    val_data: str = "val",
    batch_size: int = 64,
    num_workers: int | None = None,
    model: str | None = None,
    download: bool = False,
    hardware: Hardware | None = None,
    keep: Path | None = None,
) -> dict[str, float]:
    """Measure the classifier of a checkpoint, of a teacher or a student, in the views that it was made for.

    Args:
        checkpoint: The checkpoint.
        dataset: ``imagefolder``, or a data set by name.
        data_dir: Its folder; for imagefolder either one that holds ``val_data``, or one of class folders.
        val_data: Name of the folder of validation images within ``data_dir``.
        batch_size: Images in a batch.
        num_workers: Processes that load images; ``None`` chooses from the cores.
        model: The network; needed where the checkpoint names a Python file.
        download: Download a data set that goes by name if it is not there.
        hardware: Where to run.
        keep: A file to write what it said of each image to, or ``None``.

    Returns:
        ``val/acc``, ``val/loss``, ``val/top5`` (for more than five classes), and ``images``, their number.

    Raises:
        UserError: If the checkpoint or the images can't be had, or the images have a class that it does not know.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, and is {batch_size}")
    if num_workers is not None and num_workers < 0:
        raise UserError(f"--num_workers must be at least 0, and is {num_workers}")
    classifier = load_classifier(checkpoint, architecture=model)
    description = classifier.description
    images = validation_images(dataset, data_dir, val_data, download=download)
    images = match_classes(images, description.classes, network=checkpoint)
    chosen, _ = (hardware or Hardware()).resolved()
    data = ImageData(
        Splits("evaluation", train=images, val=images),
        image_size=description.image_size,
        batch_size=batch_size,
        num_workers=default_workers(chosen.accelerator) if num_workers is None else num_workers,
        resize=description.resize,
    )
    return evaluate(
        classifier, data, hardware=chosen, predictions=None if keep is None else PredictionRecorder(keep)
    ) | {"images": float(len(images))}
