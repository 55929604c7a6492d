"""Training one network once, or measuring one: a Lightning trainer with what this tool wants of it."""

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console

from kd.data import ImageData
from kd.errors import UserError
from kd.models import Classifier
from kd.training.callbacks import Throughput, TrainingImages
from kd.training.modules import ClassifierModule
from kd.training.progress import PhaseProgress


@dataclass(frozen=True)
class Hardware:
    """Where Lightning runs, in its words.

    Args:
        accelerator: ``auto`` (a GPU if there is one), ``cpu``, ``gpu``, ...
        devices: ``auto``, a number, or which (``"0,1"``).
        num_nodes: Number of machines.
        strategy: ``auto``, ``ddp``, ...
        precision: ``auto``, ``32-true``, ``bf16-mixed``, ...
        fast_dev_run: One batch of everything, and no files.
        limit_train_batches: Batches of an epoch: a number (int), or a part (float).
        limit_val_batches: Batches of a validation, likewise.
    """

    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    fast_dev_run: bool = False
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0

    def resolved(self) -> tuple["Hardware", list[str]]:
        """Replace ``auto`` by what this machine has, and say what was chosen and why."""
        remarks: list[str] = []
        chosen = self
        if self.accelerator == "auto":
            if torch.cuda.is_available():
                chosen = replace(chosen, accelerator="gpu")
            elif torch.backends.mps.is_available():
                chosen = replace(chosen, accelerator="mps")
            else:
                as_one = "" if self.devices in ("auto", "1") else f"; --devices {self.devices} would be GPUs"
                remarks.append(f"No GPU was found: running on the CPU{as_one}.")
                chosen = replace(chosen, accelerator="cpu", devices="1")
        if self.precision == "auto":
            precision = _best_precision(chosen.accelerator)
            remarks.append(f"Precision: {precision} (--precision changes it).")
            chosen = replace(chosen, precision=precision)
        return chosen, remarks


def _best_precision(accelerator: str) -> str:
    if accelerator in ("gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "32-true"


@dataclass(frozen=True)
class Run:
    """What a training came to; accuracies are fractions of 1.

    Args:
        phase: ``teacher``, ``baseline`` or ``distilled``.
        seed: Its seed.
        model: The network.
        parameters: How many numbers training set.
        epochs: Epochs trained.
        steps: Optimizer steps made.
        val_acc: Accuracy on the validation images after the last epoch.
        best_val_acc: The best after any epoch.
        val_loss: Cross-entropy with the validation labels after the last epoch, in nats.
        agreement: Share of validation images on which the student decides as the teacher, after the last epoch.
        seconds: Wall time of the training, validation included.
        images_per_second: Training images a second, without validation.
        checkpoint: Its best checkpoint, or ``None`` where none was kept.
        folder: Where its files are, or ``None``.
    """

    phase: str
    seed: int
    model: str
    parameters: int
    epochs: int
    steps: int
    val_acc: float
    best_val_acc: float
    val_loss: float
    agreement: float | None
    seconds: float
    images_per_second: float
    checkpoint: str | None
    folder: str | None


class EventLogger(TensorBoardLogger):
    """TensorBoard without the curve of the epoch's number, which Lightning adds to whatever is logged."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all but the epoch."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def train(
    module: ClassifierModule,
    data: ImageData,
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
) -> Run:
    """Train a network, with its checkpoints and its TensorBoard events in a new version of ``folder/phase``.

    Args:
        module: The network and its objective; it holds the weights of the last epoch afterwards.
        data: The images.
        phase: ``teacher``, ``baseline`` or ``distilled``.
        folder: The experiment's folder.
        hardware: Where it runs.
        max_epochs: Epochs.
        max_steps: End after this many optimizer steps, if that is sooner.
        gradient_clip: Largest norm of the gradient.
        accumulate: Batches whose gradients are summed before a step.
        hyperparameters: What TensorBoard's HPARAMS tab shows beside the final accuracy.
        title: What the progress bar calls it.
        console: Where the progress bar is drawn.

    Returns:
        What it came to.

    Raises:
        UserError: If Lightning can't run on such hardware.
    """
    logger = EventLogger(str(folder), name=phase, default_hp_metric=False)
    best = ModelCheckpoint(filename="best", monitor="val/acc", mode="max")
    # Not save_last of the one above: that writes only where the best was written.
    last = ModelCheckpoint(filename="last", enable_version_counter=False)
    throughput = Throughput()
    progress = PhaseProgress(title or phase, console=console)
    trainer = _trainer(
        hardware,
        logger=logger,
        callbacks=[throughput, TrainingImages(), progress, *([] if hardware.fast_dev_run else [best, last])],
        max_epochs=max_epochs,
        max_steps=-1 if max_steps is None else max_steps,
        gradient_clip_val=gradient_clip,
        accumulate_grad_batches=accumulate,
    )
    start = time.perf_counter()
    with quiet_lightning():
        trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    run = Run(
        phase=phase,
        seed=data.seed,
        model=module.model.description.architecture,
        parameters=module.model.count_parameters(),
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        val_acc=metrics["val/acc"],
        best_val_acc=metrics["val/acc"] if best.best_model_score is None else float(best.best_model_score),
        val_loss=metrics["val/loss"],
        agreement=metrics.get("val/agreement"),
        seconds=seconds,
        images_per_second=throughput.images_per_second,
        checkpoint=best.best_model_path or None,
        folder=None if hardware.fast_dev_run else trainer.log_dir,
    )
    if not hardware.fast_dev_run:
        # The HPARAMS tab reads the last value of a curve: here that of the last epoch, at the step where it stands.
        final = {"val/acc": run.val_acc}
        parameters = _for_hparams(hyperparameters or {}, phase=phase, seed=data.seed)
        logger.log_hyperparams(parameters, metrics=final, step=trainer.global_step - 1)
        logger.finalize("success")
    return run


def evaluate(classifier: Classifier, data: ImageData, *, hardware: Hardware) -> dict[str, float]:
    """Measure a classifier on the validation images.

    Args:
        classifier: The classifier; it is left in evaluation mode.
        data: The images.
        hardware: Where it runs.

    Returns:
        ``val/acc``, ``val/loss`` and, for more than five classes, ``val/top5``; accuracies are fractions of 1.
    """
    trainer = _trainer(hardware, logger=False, enable_checkpointing=False)
    with quiet_lightning():
        results = trainer.validate(ClassifierModule(classifier), datamodule=data, verbose=False)
    classifier.eval()
    return dict(results[0])


def _trainer(hardware: Hardware, **options: Any) -> Trainer:
    hardware, _ = hardware.resolved()
    devices = int(hardware.devices) if hardware.devices.lstrip("-").isdigit() else hardware.devices
    try:
        with quiet_lightning():
            return Trainer(
                accelerator=hardware.accelerator,
                devices=devices,
                num_nodes=hardware.num_nodes,
                strategy=hardware.strategy,
                precision=hardware.precision,  # type: ignore[arg-type]  # Lightning checks it
                fast_dev_run=hardware.fast_dev_run,
                limit_train_batches=hardware.limit_train_batches,
                limit_val_batches=hardware.limit_val_batches,
                # EpochSampler shares the images out itself, and counts each validation image once.
                use_distributed_sampler=False,
                # The modules log in their own time; of what they log nothing is held back.
                log_every_n_steps=1,
                num_sanity_val_steps=0,
                enable_progress_bar=False,
                enable_model_summary=False,
                **options,
            )
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        flags = f"--accelerator {hardware.accelerator} --devices {hardware.devices} --strategy {hardware.strategy}"
        raise UserError(f"{flags} --precision {hardware.precision}: {error}") from None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's news of itself and its tips; its warnings stay, but for those that do not apply here."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # The number of workers is chosen on purpose: on few cores they would take the training's own.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # The flags decide about the accelerator; Lightning need not advertise another.
        warnings.filterwarnings("ignore", message=".*available but not used.*")
        # Lightning's own call of a function that torch has renamed.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _for_hparams(hyperparameters: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return what TensorBoard can show: numbers, booleans and words."""
    merged = {**hyperparameters, **more}
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in merged.items()
        if value is not None
    }
