"""Training one network, or validating one, with Lightning."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from rich.console import Console

from kd.console import make_console
from kd.data import Batches
from kd.metrics import ACCURACY, logged_as
from kd.models import Classifier, Ensemble
from kd.training.callbacks import StopOnNonFinite, Throughput
from kd.training.loggers import TrainingImages
from kd.training.modules import ClassifierModule
from kd.training.predictions import VALIDATION_FILE, PredictionRecorder
from kd.training.progress import PhaseProgress
from kd.training.resume import LastCheckpoint, ResumeOptions
from kd.training.statistics import ValidationAtChance
from kd.training.trainer import Hardware, build_trainer, quiet_lightning, readable_errors


@dataclass(frozen=True)
class Run:
    """The results of one training; accuracies are fractions of 1, and files that weren't written are ``None``.

    Args:
        phase: ``teacher``, ``assistant/...``, ``baseline``, ``distilled``, ...
        seed: The random seed.
        model: Name of the architecture.
        parameters: Number of trained parameters.
        epochs: Number of epochs.
        steps: Number of optimizer steps.
        val_acc: Validation accuracy after the last epoch.
        best_val_acc: Best validation accuracy after any epoch.
        metric: The metric that chooses the best epoch.
        score: Its value after the last epoch.
        best_score: Its best value after any epoch.
        val_loss: Validation cross-entropy after the last epoch, in nats; ``None`` if it is not finite.
        agreement: Fraction of validation images for which the student's top-1 class is the teacher's; ``None`` without
            a teacher.
        seconds: Wall time of the training, including validation.
        images_per_second: Training images per second, without validation.
        checkpoint: The checkpoint of the best epoch.
        folder: The run's folder.
        validation: The file of the last epoch's logits of the validation images.
        history: Metrics of each epoch.
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
    metric: str = ACCURACY
    score: float | None = None
    best_score: float | None = None
    validation: str | None = None
    history: tuple[dict[str, float | None], ...] = ()


def train(
    module: ClassifierModule,
    data: Batches,
    *,
    phase: str,
    folder: Path | None,
    hardware: Hardware,
    max_epochs: int,
    max_steps: int | None = None,
    gradient_clip: float | None = None,
    accumulate: int = 1,
    early_stopping: int | None = None,
    loggers: Sequence[Logger] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    title: str | None = None,
    console: Console | None = None,
    resume: ResumeOptions | None = None,
    on_epoch: Callable[[int, float], object] | None = None,
) -> Run:
    """Train a network.

    Args:
        module: The network and its objective; afterwards it holds the weights of the last epoch.
        data: The images.
        phase: Name of the phase: ``teacher``, ``teacher/resnet18``, ``baseline``, ``distilled``, ...
        folder: The run's own folder, for checkpoints and the logits of the validation images; ``None`` writes no files.
        hardware: Accelerator, devices, precision, ...
        max_epochs: Maximum number of epochs.
        max_steps: Maximum number of optimizer steps.
        gradient_clip: Maximum norm of the gradient.
        early_stopping: Number of epochs without a better value of the module's metric after which to stop; ``None``:
            never.
        accumulate: Number of batches whose gradients are accumulated for an optimizer step.
        loggers: Lightning loggers, such as :class:`kd.training.RunTensorBoard`, for scalars, hyperparameters and, if
            they support them, images.
        hyperparameters: Logged with the final accuracy.
        title: Name of the run in the progress bar.
        console: Where the progress is shown.
        resume: How the run is saved, and the checkpoint to resume from.
        on_epoch: Called in the first process after each epoch with its number, from 0, and the validation accuracy, or
            the module's other metric; an exception from it ends the training.

    Raises:
        UserError: If Lightning doesn't support the hardware, or the loss or the gradient isn't finite.
        Interrupted: After SIGTERM or SIGINT, once a checkpoint is saved.
    """
    folder, resume = None if hardware.fast_dev_run else folder, resume or ResumeOptions()
    module.max_steps = max_steps
    throughput, last = Throughput(), LastCheckpoint(folder, resume)
    predictions = PredictionRecorder(None if folder is None else folder / VALIDATION_FILE)
    monitored = logged_as(module.metric)
    title = title or f"{phase} {module.model.description.architecture}"
    callbacks: list[Callback] = [
        StopOnNonFinite(),
        throughput,
        TrainingImages(),
        ValidationAtChance(console or make_console()),
        PhaseProgress(title, console or make_console(), throughput, max_steps, metric=module.metric),
        predictions,
        last,
        *_limit_callbacks(max_steps, on_epoch, monitored),
    ]
    if early_stopping is not None:
        # Before those that save, so that a resumed run counts on.
        callbacks.insert(
            0, EarlyStopping(monitored, mode="max", patience=early_stopping, check_on_train_epoch_end=False)
        )
    # Only the weights of the best epoch: a run is resumed from last.ckpt.
    best = ModelCheckpoint(
        filename="best", monitor=monitored, mode="max", save_weights_only=True, enable_version_counter=False
    )
    if folder is not None:
        # As an argument it would be made absolute, and a run whose folder has moved would lose its best accuracy.
        best.dirpath = str(folder / "checkpoints")
        callbacks.insert(0, best)
    compute = hardware.compute_for(module.model, trains=True)
    if compute.channels_last:
        module.to(memory_format=torch.channels_last)
    data.channels_last = compute.channels_last
    if hardware.compile:
        module.model.compile()
    trainer = build_trainer(
        replace(hardware, precision=compute.precision),
        logger=list(loggers),
        callbacks=callbacks,
        max_epochs=max_epochs,
        # Where Lightning saves when SLURM ends the job.
        default_root_dir=folder,
        gradient_clip_val=gradient_clip,
        accumulate_grad_batches=accumulate,
    )
    # TensorBoard shows numbers and text only.
    logged = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in {**(hyperparameters or {}), "phase": phase, "seed": data.seed}.items()
        if value is not None
    }
    for logger in trainer.loggers:
        logger.log_hyperparams(logged)
    with quiet_lightning(), readable_errors(batch_size=data.batch_size), resume.interruption.deferred():
        trainer.fit(module, datamodule=data, ckpt_path=resume.checkpoint)
    # Lightning has no metrics after a run that was resumed at its end.
    metrics = predictions.history[-1]
    accuracies, scores = ([epoch[name] or 0.0 for epoch in predictions.history] for name in ("val/acc", monitored))
    folder = last.folder
    validation = None if folder is None else folder / VALIDATION_FILE
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # The HPARAMS tab shows the last value of a curve.
            logger.log_hyperparams(logged, metrics={"val/acc": accuracies[-1]}, step=trainer.global_step - 1)
        logger.finalize("success")
    return Run(
        phase=phase,
        seed=data.seed,
        model=module.model.description.architecture,
        parameters=module.model.count_parameters(),
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        val_acc=accuracies[-1],
        best_val_acc=max(accuracies),
        metric=module.metric,
        score=scores[-1],
        best_score=max(scores),
        val_loss=metrics["val/loss"],
        agreement=metrics.get("val/agreement"),
        seconds=throughput.wall_seconds,
        images_per_second=throughput.images_per_second,
        checkpoint=best.best_model_path or None,
        folder=None if folder is None else str(folder),
        validation=str(validation) if validation is not None and validation.is_file() else None,
        history=tuple(predictions.history),
    )


def _limit_callbacks(
    max_steps: int | None, on_epoch: Callable[[int, float], object] | None, monitored: str
) -> list[Callback]:
    """Return callbacks that end training after ``max_steps``, and call ``on_epoch``."""

    def stop(trainer: Trainer, *_: object) -> None:
        # Lightning's own max_steps ends without a validation, and such a run can't be resumed to the same result.
        if max_steps is not None and trainer.global_step >= max_steps:
            trainer.should_stop = True

    def report(trainer: Trainer, *_: object) -> None:
        if on_epoch is not None and trainer.is_global_zero:
            on_epoch(trainer.current_epoch, float(trainer.callback_metrics[monitored]))

    return [LambdaCallback(on_train_start=stop, on_train_batch_end=stop, on_train_epoch_end=report)]


def evaluate(
    classifier: Classifier | Ensemble,
    data: Batches,
    *,
    hardware: Hardware,
    predictions: PredictionRecorder | None = None,
    metric: str = ACCURACY,
) -> dict[str, float]:
    """Measure ``val/acc``, ``val/loss`` and, for more than five classes, ``val/top5`` on the validation images.

    Another metric is measured, too, as ``val/NAME``. The classifier is left in evaluation mode. Accuracies are
    fractions of 1.
    """
    compute = hardware.compute_for(classifier, trains=False)
    data.channels_last = compute.channels_last
    trainer = build_trainer(
        replace(hardware, precision=compute.precision),
        logger=False,
        enable_checkpointing=False,
        callbacks=[] if predictions is None else [predictions],
    )
    with quiet_lightning(), readable_errors():
        results = trainer.validate(ClassifierModule(classifier, metric=metric), datamodule=data, verbose=False)
    classifier.eval()
    return dict(results[0])
