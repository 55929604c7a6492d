"""The Lightning trainer: hardware, checkpoint files, and readable errors."""

import logging
import multiprocessing
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO

from kd.errors import LostContact, UserError, describe_environment_error
from kd.files import write_atomically
from kd.models import Classifier, Compute, Ensemble, fastest, find_damage, keep_large_blocks, read_plain

_RESUME = "the last checkpoint is intact: resume with --resume"

# Messages of gloo, NCCL and torch's key-value store about a process that doesn't respond.
_NO_RESPONSE = re.compile(
    r"gloo|NCCL|Connection (?:reset|closed|refused)|Broken pipe|Socket Timeout|store.*timeout", re.IGNORECASE
)

_IRRELEVANT_WARNINGS = (
    # The number of workers is chosen deliberately: on few cores they would slow the training down.
    ".*does not have many workers.*",
    # The accelerator is chosen by a flag.
    ".*available but not used.*",
    # A resumed run continues in its folder.
    ".*exists and is not empty.*",
    # A reused classifier layer isn't trained.
    ".*in eval mode at the start of training.*",
    # Lightning calls a function that torch has renamed.
    ".*isinstance.treespec, LeafSpec.*",
)


@dataclass(frozen=True)
class Hardware:
    """Where and how Lightning runs; fields are named as arguments of its Trainer, and texts as it accepts them.

    ``channels_last`` (``auto``, ``true`` or ``false``) chooses whether the channels of a pixel are contiguous in
    memory, and ``compile`` whether networks are compiled.
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
        """Choose the accelerator if it is ``auto``; return the resolved hardware and notes on the choice."""
        if self.accelerator != "auto":
            return self, []
        if torch.cuda.is_available():
            return replace(self, accelerator="gpu"), []
        if torch.backends.mps.is_available():
            return replace(self, accelerator="mps"), []
        ignored = "" if self.devices in ("auto", "1") else f"; --devices {self.devices} would need GPUs"
        return replace(self, accelerator="cpu", devices="1"), [f"No GPU found: running on the CPU{ignored}."]

    def compute_for(self, network: Classifier | Ensemble, *, trains: bool) -> Compute:
        """Choose precision and memory layout for training a network or for inference, if they are ``auto``."""
        hardware, _ = self.resolved()
        compute = fastest(network, accelerator=hardware.accelerator, trains=trains)
        if self.precision != "auto":
            compute = replace(compute, precision=self.precision, reason="set by --precision")
        if self.channels_last != "auto":
            compute = replace(compute, channels_last=self.channels_last == "true")
        return compute


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically; reads plain values and tensors only, and verifies checksums."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; if that fails, such as on a full disk, the previous file is intact."""
        path = Path(path)
        try:
            with write_atomically(path) as file:
                torch.save(checkpoint, file)
                file.flush()
                _verify(Path(file.name))
        except (OSError, RuntimeError) as error:
            # torch's writer reports a full disk as a RuntimeError of its own.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            kept = f"; the previous one is intact: {path}" if path.is_file() else ""
            raise UserError(f"can't write the checkpoint {path}: {reason}{kept}") from error

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint, always with ``weights_only=True``."""
        checkpoint: dict[str, Any] = read_plain(Path(path))
        return checkpoint


def _verify(path: Path) -> None:
    if (damage := find_damage(path)) is not None:
        raise OSError(damage)


def build_trainer(hardware: Hardware, **options: Any) -> Trainer:
    """Build a trainer with further Lightning ``options``, without its own sampler, progress bar and summary.

    Raises:
        UserError: If Lightning doesn't support the hardware.
    """
    hardware, _ = hardware.resolved()
    _check_port(hardware)
    if hardware.accelerator == "cpu":
        keep_large_blocks()
    precision: Any = "32-true" if hardware.precision == "auto" else hardware.precision
    try:
        with quiet_lightning():
            return Trainer(
                accelerator=hardware.accelerator,
                devices=int(hardware.devices) if hardware.devices.lstrip("-").isdigit() else hardware.devices,
                num_nodes=hardware.num_nodes,
                strategy=hardware.strategy,
                precision=precision,
                fast_dev_run=hardware.fast_dev_run,
                limit_train_batches=hardware.limit_train_batches,
                limit_val_batches=hardware.limit_val_batches,
                # EpochSampler distributes the images itself, without repeating any in validation.
                use_distributed_sampler=False,
                # TrainingMetrics decides when to log.
                log_every_n_steps=1,
                num_sanity_val_steps=0,
                enable_progress_bar=False,
                enable_model_summary=False,
                plugins=[AtomicCheckpointIO()],
                **options,
            )
    except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
        names = ("accelerator", "devices", "strategy", "precision", "limit_train_batches", "limit_val_batches")
        flags = " ".join(f"--{name} {getattr(hardware, name)}" for name in names)
        raise UserError(f"{flags}: {error}") from None


def _check_port(hardware: Hardware) -> None:
    """Refuse a port for the processes' rendezvous that another program listens on, before any of them is started."""
    port = os.environ.get("MASTER_PORT")
    # With a launcher such as torchrun, it is the launcher that listens.
    if port is None or hardware.devices in ("1", "auto") or "LOCAL_RANK" in os.environ or not port.isdigit():
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", int(port)))
        except OSError as error:
            raise UserError(
                f"--devices {hardware.devices}: MASTER_PORT={port} can't be used: {error.strerror}; set another port, "
                "or unset it"
            ) from None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's information and tips, and its warnings that don't apply here."""
    with warnings.catch_warnings(), ExitStack() as stack:
        for message in _IRRELEVANT_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for name in ("pytorch_lightning", "lightning_fabric"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        yield


@contextmanager
def readable_errors(*, batch_size: int | None = None) -> Iterator[None]:
    """Turn faults of memory, disk or another process, and what Lightning refuses, into a ``UserError``."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"Lightning refuses this configuration: {error}") from None
    except MemoryError as error:
        raise UserError(f"out of memory: try a smaller --batch_size; {_RESUME}") from error
    except OSError as error:
        if (problem := describe_environment_error(error)) is None:
            raise
        raise UserError(f"{problem}; {_RESUME}") from error
    except RuntimeError as error:
        text = str(error)
        if re.search(r"DataLoader worker .* (?:killed|exited)", text):
            raise UserError(_explain_lost_worker()) from error
        if isinstance(error, torch.OutOfMemoryError) or re.search(r"can't allocate memory|out of memory", text):
            reason = text.partition("\n")[0].partition(". GPU")[0]
            flag, remedy = "", ""
            if batch_size is not None:
                flag = f"--batch_size {batch_size}: "
                remedy = f"--batch_size {max(1, batch_size // 2)} --accumulate 2 needs half of it, and "
            raise UserError(
                f"{flag}out of memory ({reason}); {remedy}--batch_size auto finds the largest that fits"
            ) from error
        if torch.distributed.is_available() and torch.distributed.is_initialized() and _NO_RESPONSE.search(text):
            reason = text.rpartition("] ")[2].partition(". This")[0]
            raise LostContact(f"lost contact with another process of this run ({reason}); {_RESUME}") from error
        raise


def _explain_lost_worker() -> str:
    """Return why a data loading process may have ended."""
    causes = "probably out of memory"
    if multiprocessing.get_start_method() != "fork":
        # Such a process imports the script that started it.
        causes += ", or the script that trains does so without `if __name__ == '__main__':`"
    return f"a data loading process was killed, {causes}: try fewer --num_workers or a smaller --batch_size; {_RESUME}"
