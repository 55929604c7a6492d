"""What a network said of each validation image at last, and what each epoch came to: what a report is made from."""

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

VALIDATION_FILE = "validation.npz"


class PredictionRecorder(Callback):
    """Keeps the logits of the last validation, image by image, and the figures of each epoch.

    Args:
        path: The file that they are written to, or ``None``.

    Attributes:
        decisions: The classes that it decided for, ``(N,)`` in the order of the images; ``None`` where not all were
            shown.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.history: list[dict[str, float | None]] = []
        self.decisions: Tensor | None = None
        self._parts: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training goes on with."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the epochs before."""
        self.history = list(state_dict["history"])

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Forget the validation before."""
        self._parts = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Keep the logits of a batch."""
        self._parts.append(outputs.detach().cpu())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the epoch came to."""
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        figures |= getattr(pl_module, "train_metrics", {})
        self.history.append(
            {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
            | {name: value if math.isfinite(value) else None for name, value in figures.items()}
        )
        # Before the last checkpoint: a training that is resumed from it has nothing left to do.
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Write them at the end of a validation by itself."""
        if not trainer.training and trainer.state.fn == "validate":
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        data = getattr(trainer, "datamodule", None)
        if not self._parts or not isinstance(data, Batches):
            return
        predictions = self.gathered(trainer, data)
        if len(predictions["logits"]) == len(data.splits.val):
            self.decisions = torch.from_numpy(predictions["logits"].argmax(axis=1))
        if self.path is not None:
            rank_zero_only(write_predictions)(predictions, self.path)

    def gathered(self, trainer: Trainer, data: Batches) -> dict[str, NDArray[Any]]:
        """Return the logits of all processes; each of them must ask.

        Args:
            trainer: Whose validation it was.
            data: The images.

        Returns:
            ``logits`` ``(N, C)``, ``labels`` and ``indices`` ``(N,)`` in the order of the images, and ``classes`` and
            ``keys``, their names.
        """
        mine = (torch.cat(self._parts), data.validation_indices(trainer.global_rank, trainer.world_size))
        parts: list[Any] = [mine]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        logits = torch.cat([part for part, _ in parts]).numpy()
        # Where a limit ended the validation early, only the first were seen.
        indices = np.concatenate([np.asarray(which[: len(part)]) for part, which in parts])
        order = np.argsort(indices, kind="stable")
        return prediction_arrays(data.splits.val, logits[order], indices[order])


def prediction_arrays(images: LabeledImages, logits: NDArray[Any], indices: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Put logits together with what they are about.

    Args:
        images: The images.
        logits: ``(N, C)``, in the order of the indices.
        indices: Of the images that were asked about, ``(N,)``.

    Returns:
        As :meth:`PredictionRecorder.gathered`.
    """
    return {
        "logits": logits,
        "labels": np.asarray(images.labels)[indices],
        "indices": indices,
        "classes": np.asarray(images.classes),
        "keys": np.asarray(images.keys)[indices],
    }


def write_predictions(predictions: dict[str, NDArray[Any]], path: Path) -> None:
    """Write what :meth:`PredictionRecorder.gathered` returned, atomically."""
    with write_atomically(path) as file:
        np.savez_compressed(file, **predictions)  # type: ignore[arg-type]  # its stub takes the names for options
