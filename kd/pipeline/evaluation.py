"""Measuring networks: the accuracy of a checkpoint on a folder of images, and the cost of running each network."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.data import ImageData, Splits, match_classes, validation_images
from kd.errors import UserError
from kd.models import load_classifier, measure_cost
from kd.pipeline.components import default_workers
from kd.pipeline.runner import Experiment
from kd.teachers import NONE, Foreign, load_network
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
    image_size: int = 224,
    multilabel: bool = False,
    foreign: Foreign | None = None,
    hardware: Hardware | None = None,
    keep: Path | None = None,
    on_note: Callable[[str], object] = lambda _: None,
) -> dict[str, float]:
    """Measure a classifier on the plain views that it was trained for.

    Args:
        checkpoint: Its file: the checkpoint of a teacher or a student, or weights of another project.
        dataset: ``imagefolder``, or a data set by name.
        data_dir: Its folder; for imagefolder one that holds ``val_data``, or the class folders themselves.
        val_data: Name of the folder of validation images within ``data_dir``.
        batch_size: Images in a batch.
        num_workers: Data loader processes; ``None``: by the number of cores.
        model: The network; needed if the file doesn't name it, or names a Python file.
        download: Download a named data set that is missing.
        image_size: Side of the images, in pixels, for files that don't record it.
        multilabel: Whether ``val_data`` is a table of images with several labels.
        foreign: What the user says about a network of another project.
        hardware: Where to run.
        keep: File to write the logits of each image to, or ``None``.
        on_note: Called with each note on what was assumed.

    Returns:
        ``val/acc``, ``val/loss``, ``val/top5`` (with more than five classes), and ``images``, their number.

    Raises:
        UserError: If the checkpoint or the images can't be read, or the images have a class unknown to the classifier.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    if num_workers is not None and num_workers < 0:
        raise UserError(f"--num_workers {num_workers}: must be at least 0")
    images = validation_images(dataset, data_dir, val_data, download=download, multilabel=multilabel)
    classifier, notes = load_network(
        None if checkpoint == NONE else Path(checkpoint).expanduser(),
        model=model,
        data_classes=images.classes,
        image_size=image_size,
        foreign=foreign or Foreign(prefix=""),
    )
    for note in notes:
        on_note(note)
    if classifier.description.multilabel and not multilabel:
        raise UserError(f"{checkpoint}: predicts several labels an image; add --multilabel, and a table as --val_data")
    description = classifier.description = replace(classifier.description, multilabel=multilabel)
    if description.pixel_range:
        images = validation_images(
            dataset, data_dir, val_data, download=download, pixel_range=description.pixel_range, multilabel=multilabel
        )
    images = match_classes(images, description.classes, network=checkpoint)
    chosen, _ = (hardware or Hardware()).resolved()
    data = ImageData(
        Splits("evaluation", train=images, val=images),
        image_size=description.image_size,
        batch_size=batch_size,
        num_workers=default_workers(chosen.accelerator) if num_workers is None else num_workers,
        resize=description.resize,
    )
    recorder = None if keep is None else PredictionRecorder(keep)
    measured = evaluate(classifier, data, hardware=chosen, predictions=recorder)
    return measured | {"images": float(len(images))}


def measure_costs(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Measure the network of each phase once: parameters, multiply-adds, latency and throughput on this machine.

    Returns:
        The result of :func:`kd.models.measure_cost` by phase; ensembles and networks without a file are left out.
    """
    costs: dict[str, dict[str, Any]] = {}
    by_network: dict[tuple[str, int], dict[str, Any]] = {}
    for phase, (record, *_) in experiment.runs.items():
        # The students of compared objectives are one network, which another phase may have too.
        is_repeated = phase == "compared" and {"baseline", "distilled"} & experiment.runs.keys()
        if is_repeated or not (record.get("checkpoint") or phase in experiment.teachers):
            continue
        try:
            classifier = experiment.teachers.get(phase) or load_classifier(
                record["checkpoint"], architecture=record["model"]
            )
        except UserError:
            # The checkpoint of an earlier run may have been removed since.
            continue
        network = (record["model"], classifier.description.image_size)
        if network not in by_network:
            by_network[network] = measure_cost(classifier)
        costs[phase] = by_network[network]
    return costs
