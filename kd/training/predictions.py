"""The logits of the validation images and the metrics of each epoch, for reports."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from kd.data import LabeledImages
from kd.files import write_atomically
from kd.metrics import decide
from kd.training.callbacks import batches_of, current_metrics

VALIDATION_FILE, TEST_FILE = "validation.npz", "test.npz"


class PredictionRecorder(Callback):
    """Records the logits of the last validation, image by image, and the metrics of each epoch.

    Attributes:
        history: The metrics of each epoch; ``None`` for values that are not finite.
        decisions: The predicted classes ``(N,)``, or ``(N, C)`` with several labels an image, in the order of the
            images; ``None`` if only some were validated.
        validated: Targets, as of `kd.data.LabeledImages.targets`, and logits ``(n, C)`` of the images that were
            validated.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.history: list[dict[str, float | None]] = []
        self.decisions: Tensor | None = None
        self.validated: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._logits: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = list(state_dict["history"])

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the previous validation's logits."""
        self._logits = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Record the logits of a batch."""
        self._logits.append(outputs.detach().cpu())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of the epoch, and write the logits after the last one."""
        metrics = {name: value if math.isfinite(value) else None for name, value in current_metrics(trainer).items()}
        self.history.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step} | metrics)
        # Before the last checkpoint is saved, as a run resumed from that one doesn't validate again.
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the logits of a validation without training."""
        if trainer.state.fn == "validate":
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not self._logits:
            return
        images, own_indices = batches_of(trainer).splits.val, batches_of(trainer).validation_indices
        parts: list[Any] = [(torch.cat(self._logits), own_indices(trainer.global_rank, trainer.world_size))]
        if trainer.world_size > 1:
            own, parts = parts[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        logits = torch.cat([part for part, _ in parts]).numpy()
        # With a limit on validation batches, only the first images of each process are validated.
        indices = np.concatenate([np.asarray(numbers[: len(part)]) for part, numbers in parts])
        order = np.argsort(indices, kind="stable")
        self.validated = images.targets(indices[order].tolist()), torch.from_numpy(logits[order])
        if len(logits) == len(images):
            self.decisions = decide(self.validated[1], multilabel=images.multilabel)
        if self.path is not None and trainer.is_global_zero:
            write_predictions(prediction_arrays(images, logits[order], indices[order]), self.path)


def prediction_arrays(images: LabeledImages, logits: NDArray[Any], indices: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Combine logits ``(N, C)`` of the images at ``indices`` ``(N,)`` with their labels, classes and keys."""
    return {
        "logits": logits,
        "labels": images.targets(indices.tolist()).numpy().astype(np.int64),
        "indices": indices,
        "classes": np.asarray(images.classes),
        "keys": np.asarray(images.keys)[indices],
    }


def write_predictions(predictions: dict[str, NDArray[Any]], path: Path) -> None:
    """Write :func:`prediction_arrays` as an ``.npz`` file, atomically."""
    with write_atomically(path) as file:
        np.savez_compressed(file, **predictions)  # type: ignore[arg-type]  # its stub takes the names for options
