"""The logits of the validation images and the metrics of each epoch, from which reports are made."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from numpy.typing import NDArray
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from kd.data import Batches, LabeledImages
from kd.files import write_atomically
from kd.training.callbacks import latest_metrics

VALIDATION_FILE = "validation.npz"


class PredictionRecorder(Callback):
    """Records the logits of the last validation, image by image, and the metrics of each epoch.

    Args:
        path: The file to write the logits to, or ``None``.

    Attributes:
        history: The metrics of each epoch; ``None`` for values that are not finite.
        decisions: The predicted classes ``(N,)`` in the order of the images; ``None`` where only some were validated.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.history: list[dict[str, float | None]] = []
        self.decisions: Tensor | None = None
        self._logits: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = list(state_dict["history"])

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Discard the previous validation's logits."""
        self._logits = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Record the logits of a batch."""
        self._logits.append(outputs.detach().cpu())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of the epoch, and write the logits after the last one."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics |= latest_metrics(pl_module)
        self.history.append(
            {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
            | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        )
        # Before the last checkpoint is saved: a run that is resumed from it has nothing left to do.
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Write the logits of a validation without training."""
        if not trainer.training and trainer.state.fn == "validate":
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        data = getattr(trainer, "datamodule", None)
        if not self._logits or not isinstance(data, Batches):
            return
        predictions = self._gather(trainer, data)
        if len(predictions["logits"]) == len(data.splits.val):
            self.decisions = torch.from_numpy(predictions["logits"].argmax(axis=1))
        if self.path is not None:
            rank_zero_only(write_predictions)(predictions, self.path)

    def _gather(self, trainer: Trainer, data: Batches) -> dict[str, NDArray[Any]]:
        """Return the predictions of all processes, each of which must call this."""
        part = (torch.cat(self._logits), data.validation_indices(trainer.global_rank, trainer.world_size))
        parts: list[Any] = [part]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, part)
        logits = torch.cat([part for part, _ in parts]).numpy()
        # A limit on validation batches lets only the first images of each process through.
        indices = np.concatenate([np.asarray(which[: len(part)]) for part, which in parts])
        order = np.argsort(indices, kind="stable")
        return prediction_arrays(data.splits.val, logits[order], indices[order])


def prediction_arrays(images: LabeledImages, logits: NDArray[Any], indices: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Combine logits with what is known of their images.

    Args:
        images: The images.
        logits: ``(N, C)``, in the order of the indices.
        indices: ``(N,)``, the positions of the predicted images.

    Returns:
        ``logits`` ``(N, C)``, ``labels`` and ``indices`` ``(N,)``, the names of ``classes`` ``(C,)``, and the ``keys``
        of the images ``(N,)``.
    """
    return {
        "logits": logits,
        "labels": np.asarray(images.labels)[indices],
        "indices": indices,
        "classes": np.asarray(images.classes),
        "keys": np.asarray(images.keys)[indices],
    }


def write_predictions(predictions: dict[str, NDArray[Any]], path: Path) -> None:
    """Write what :func:`prediction_arrays` returned as an ``.npz`` file, atomically."""
    with write_atomically(path) as file:
        np.savez_compressed(file, **predictions)  # type: ignore[arg-type]  # its stub takes the names for options
