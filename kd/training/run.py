"""Training one network once, or measuring one: a Lightning trainer with what this tool wants of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console

from kd.data import Batches
from kd.models import Classifier, Ensemble
from kd.training.callbacks import EachEpoch, StopAfter, Throughput, TrainingImages
from kd.training.checkpoints import BEST_CHECKPOINT, LastCheckpoint, Persistence
from kd.training.failures import in_plain_words
from kd.training.hardware import Hardware, build_trainer, quiet_lightning
from kd.training.health import StopAtNonFinite
from kd.training.modules import ClassifierModule
from kd.training.predictions import VALIDATION_FILE, PredictionRecorder
from kd.training.progress import PhaseProgress


@dataclass(frozen=True)
class Run:
    """What a training came to; accuracies are fractions of 1.

    Args:
        phase: ``teacher``, ``assistant/...``, ``baseline``, ``distilled``, ...
        seed: Its seed.
        model: The network.
        parameters: How many numbers training set.
        epochs: Epochs trained.
        steps: Optimizer steps made.
        val_acc: Accuracy on the validation images after the last epoch.
        best_val_acc: The best after any epoch.
        val_loss: Cross-entropy with the validation labels after the last epoch, in nats; ``None`` if it is not finite.
        agreement: Share of validation images on which the student decides as the teacher, after the last epoch.
        seconds: Wall time of the training, validation included.
        images_per_second: Training images a second, without validation.
        checkpoint: Its best checkpoint, or ``None`` where none was kept.
        folder: Where its files are, or ``None``.
        validation: The file of what it said of each validation image at last, or ``None``.
        history: What each epoch came to.
    """

    phase: str
    seed: int
    model: str
    parameters: int
    epochs: int
    steps: int
    val_acc: float
    best_val_acc: float
    val_loss: float | None
    agreement: float | None
    seconds: float
    images_per_second: float
    checkpoint: str | None
    folder: str | None
    validation: str | None = None
    history: tuple[dict[str, float | None], ...] = ()


_FORGETFUL = Persistence()


class EventLogger(TensorBoardLogger):
    """TensorBoard without the curve of the epoch's number, which Lightning adds to whatever is logged."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all but the epoch."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def train(
    module: ClassifierModule,
    data: Batches,
    *,
    phase: str,
    folder: Path,
    hardware: Hardware,
    max_epochs: int,
    max_steps: int | None = None,
    gradient_clip: float | None = None,
    accumulate: int = 1,
    hyperparameters: Mapping[str, Any] | None = None,
    title: str | None = None,
    console: Console | None = None,
    persistence: Persistence = _FORGETFUL,
    on_epoch: Callable[[int, float], object] | None = None,
) -> Run:
    """Train a network, with its checkpoints and its TensorBoard events in a version of ``folder/phase``.

    Args:
        module: The network and its objective; it holds the weights of the last epoch afterwards.
        data: The images.
        phase: Its name, and that of its folder: ``teacher``, ``teacher/resnet18``, ``distilled``.
        folder: The experiment's folder.
        hardware: Where it runs.
        max_epochs: Epochs.
        max_steps: End after this many optimizer steps, if that is sooner.
        gradient_clip: Largest norm of the gradient.
        accumulate: Batches whose gradients are summed before a step.
        hyperparameters: What TensorBoard's HPARAMS tab shows beside the final accuracy.
        title: What the progress bar calls it.
        console: Where the progress bar is drawn.
        persistence: What it leaves on its way to go on from, and where it goes on.
        on_epoch: Told the epoch, counted from 0, and the accuracy on the validation images; what it raises ends the
            training.

    Returns:
        What it came to.

    Raises:
        UserError: If Lightning can't run on such hardware, or the loss or the gradient is no finite number.
        Interrupted: If it was asked to stop; what was done is saved.
    """
    logger = EventLogger(str(folder), name=phase, default_hp_metric=False, **persistence.logging)
    if persistence.on_begin is not None and not hardware.fast_dev_run:
        rank_zero_only(persistence.on_begin)(Path(logger.log_dir))
    # To be shipped: the weights alone. What a resume needs is in the last one.
    best = ModelCheckpoint(
        filename=Path(BEST_CHECKPOINT).stem,
        monitor="val/acc",
        mode="max",
        save_weights_only=True,
        enable_version_counter=False,
    )
    module.max_steps = max_steps
    throughput, predictions = Throughput(), PredictionRecorder()
    progress = PhaseProgress(title or phase, console=console)
    compute = hardware.compute_for(module.model, trains=True)
    if compute.channels_last:
        module.to(memory_format=torch.channels_last)
    data.channels_last = compute.channels_last
    if hardware.compile:
        module.model.compile()
    trainer = build_trainer(
        replace(hardware, precision=compute.precision),
        logger=logger,
        callbacks=[
            StopAtNonFinite(),
            throughput,
            *([] if max_steps is None else [StopAfter(max_steps)]),
            TrainingImages(),
            progress,
            predictions,
            *([] if on_epoch is None else [EachEpoch(on_epoch)]),
            *([] if hardware.fast_dev_run else [best, LastCheckpoint(persistence)]),
        ],
        max_epochs=max_epochs,
        # Where SLURM tells Lightning to save, and where Lightning looks when SLURM starts the job again.
        default_root_dir=logger.log_dir,
        gradient_clip_val=gradient_clip,
        accumulate_grad_batches=accumulate,
    )
    with quiet_lightning(), in_plain_words(batch_size=data.batch_size), persistence.interruption.waiting():
        trainer.fit(module, datamodule=data, ckpt_path=persistence.checkpoint)
    # Not Lightning's figures: where a training was resumed at its end there are none.
    metrics = predictions.history[-1]
    accuracies = [epoch["val/acc"] or 0.0 for epoch in predictions.history]
    kept = Path(logger.log_dir) / VALIDATION_FILE
    run = Run(
        phase=phase,
        seed=data.seed,
        model=module.model.description.architecture,
        parameters=module.model.count_parameters(),
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        val_acc=accuracies[-1],
        best_val_acc=max(accuracies),
        val_loss=metrics["val/loss"],
        agreement=metrics.get("val/agreement"),
        seconds=throughput.wall_seconds,
        images_per_second=throughput.images_per_second,
        checkpoint=best.best_model_path or None,
        folder=None if hardware.fast_dev_run else trainer.log_dir,
        validation=str(kept) if kept.is_file() else None,
        history=tuple(predictions.history),
    )
    if not hardware.fast_dev_run:
        # The HPARAMS tab reads the last value of a curve: here that of the last epoch, at the step where it stands.
        final = {"val/acc": run.val_acc}
        parameters = _for_hparams(hyperparameters or {}, phase=phase, seed=data.seed)
        logger.log_hyperparams(parameters, metrics=final, step=trainer.global_step - 1)
        logger.finalize("success")
    return run


def evaluate(
    classifier: Classifier | Ensemble,
    data: Batches,
    *,
    hardware: Hardware,
    predictions: PredictionRecorder | None = None,
) -> dict[str, float]:
    """Measure a classifier on the validation images.

    Args:
        classifier: The classifier; it is left in evaluation mode.
        data: The images.
        hardware: Where it runs.
        predictions: Keeps what it said of each image, or ``None``.

    Returns:
        ``val/acc``, ``val/loss`` and, for more than five classes, ``val/top5``; accuracies are fractions of 1.
    """
    compute = hardware.compute_for(classifier, trains=False)
    data.channels_last = compute.channels_last
    trainer = build_trainer(
        replace(hardware, precision=compute.precision),
        logger=False,
        enable_checkpointing=False,
        callbacks=[] if predictions is None else [predictions],
    )
    with quiet_lightning(), in_plain_words():
        results = trainer.validate(ClassifierModule(classifier), datamodule=data, verbose=False)
    classifier.eval()
    return dict(results[0])


def _for_hparams(hyperparameters: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return what TensorBoard can show: numbers, booleans and words."""
    merged = {**hyperparameters, **more}
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in merged.items()
        if value is not None
    }
