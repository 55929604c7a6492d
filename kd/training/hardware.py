"""Where a training runs, and the Lightning trainer for it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer

from kd.errors import UserError
from kd.models import Classifier, Compute, Ensemble, fastest, keep_large_blocks
from kd.training.checkpoints import AtomicCheckpointIO


@dataclass(frozen=True)
class Hardware:
    """Where Lightning runs, in its terms.

    Args:
        accelerator: ``auto`` (a GPU if there is one), ``cpu``, ``gpu``, ...
        devices: ``auto``, a number, or a list of indices (``"0,1"``).
        num_nodes: Number of machines.
        strategy: ``auto``, ``ddp``, ...
        precision: ``auto``, ``32-true``, ``bf16-mixed``, ...
        channels_last: ``auto``, ``true`` or ``false``: whether the channels of a pixel are contiguous in memory.
        compile: Whether networks are compiled.
        fast_dev_run: Run one batch of everything, and write no files.
        limit_train_batches: Batches of an epoch: a number (int) or a fraction (float).
        limit_val_batches: Batches of a validation, likewise.
    """

    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    channels_last: str = "auto"
    compile: bool = False
    fast_dev_run: bool = False
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0

    def resolved(self) -> tuple["Hardware", list[str]]:
        """Choose the accelerator where that is ``auto``; return the choice with remarks on it."""
        if self.accelerator != "auto":
            return self, []
        if torch.cuda.is_available():
            return replace(self, accelerator="gpu"), []
        if torch.backends.mps.is_available():
            return replace(self, accelerator="mps"), []
        ignored = "" if self.devices in ("auto", "1") else f"; --devices {self.devices} would need GPUs"
        return replace(self, accelerator="cpu", devices="1"), [f"No GPU found: running on the CPU{ignored}."]

    def compute_for(self, network: Classifier | Ensemble, *, trains: bool) -> Compute:
        """Choose precision and memory layout for a network, where they are ``auto``.

        Args:
            network: The network.
            trains: Whether it is trained; else it is used for inference only.
        """
        hardware, _ = self.resolved()
        compute = fastest(network, accelerator=hardware.accelerator, trains=trains)
        if self.precision != "auto":
            compute = replace(compute, precision=self.precision, why="set by --precision")
        if self.channels_last != "auto":
            compute = replace(compute, channels_last=self.channels_last == "true")
        return compute


def build_trainer(hardware: Hardware, **options: Any) -> Trainer:
    """Build a trainer without Lightning's own sampler, progress bar and summary, which this package replaces.

    Args:
        hardware: Where it runs.
        options: Further arguments of Lightning's Trainer.

    Raises:
        UserError: If Lightning doesn't support the hardware.
    """
    hardware, _ = hardware.resolved()
    precision = "32-true" if hardware.precision == "auto" else hardware.precision
    plugins = [AtomicCheckpointIO(), *options.pop("plugins", [])]
    if hardware.accelerator == "cpu":
        keep_large_blocks()
    devices = int(hardware.devices) if hardware.devices.lstrip("-").isdigit() else hardware.devices
    try:
        with quiet_lightning():
            return Trainer(
                accelerator=hardware.accelerator,
                devices=devices,
                num_nodes=hardware.num_nodes,
                strategy=hardware.strategy,
                precision=precision,  # type: ignore[arg-type]  # Lightning checks it
                fast_dev_run=hardware.fast_dev_run,
                limit_train_batches=hardware.limit_train_batches,
                limit_val_batches=hardware.limit_val_batches,
                # EpochSampler distributes the images itself, and gives each validation image once.
                use_distributed_sampler=False,
                # TrainingMetrics decides when to log; nothing of that is dropped.
                log_every_n_steps=1,
                num_sanity_val_steps=0,
                enable_progress_bar=False,
                enable_model_summary=False,
                plugins=plugins,
                **options,
            )
    except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
        flags = f"--accelerator {hardware.accelerator} --devices {hardware.devices} --strategy {hardware.strategy}"
        flags += f" --precision {hardware.precision} --limit_train_batches {hardware.limit_train_batches}"
        raise UserError(f"{flags} --limit_val_batches {hardware.limit_val_batches}: {error}") from None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's information and tips, and those of its warnings that don't apply here."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # The number of workers is chosen deliberately: on few cores they would slow the training down.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # The accelerator is chosen by a flag.
        warnings.filterwarnings("ignore", message=".*available but not used.*")
        # A resumed run continues in its folder.
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        # Lightning calls a function that torch has renamed.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
