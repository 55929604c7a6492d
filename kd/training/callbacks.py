"""What is watched while a network trains: its speed, and the images that it is shown."""

import time
from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Images a second in training, over all processes, without the time of validation; logged each epoch."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self._wall_before = 0.0
        self._wall_start = time.perf_counter()
        self._epoch_images = 0
        self._epoch_start = 0.0
        self._last_batch_end = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training goes on with."""
        return {"images": self.images, "seconds": self.seconds, "wall_seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was counted before."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]
        self._wall_before = state_dict["wall_seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, as a resumed epoch does not begin once more."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Start the clock."""
        self._epoch_images = 0
        self._epoch_start = self._last_batch_end = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Count the batch."""
        self._epoch_images += len(batch[1]) * trainer.world_size
        self._last_batch_end = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Log the epoch's speed."""
        seconds = self._last_batch_end - self._epoch_start
        self.images += self._epoch_images
        self.seconds += seconds
        speed = {"images_per_second": self._epoch_images / max(seconds, 1e-9)}
        for logger in trainer.loggers:
            logger.log_metrics(speed, step=trainer.global_step - 1)

    @property
    def wall_seconds(self) -> float:
        """The time of the training, validation included, with that before it was resumed."""
        return self._wall_before + time.perf_counter() - self._wall_start

    @property
    def images_per_second(self) -> float:
        """The speed over the whole of the training."""
        return self.images / max(self.seconds, 1e-9)


class StopAfter(Callback):
    """Ends a training after so many steps, within an epoch too, with a validation.

    Lightning's own ``max_steps`` would end without one, and would not resume as it began.

    Args:
        steps: Optimizer steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Ask for no more where all were made before."""
        trainer.should_stop = trainer.global_step >= self.steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Ask for a stop, before which Lightning validates."""
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


class EachEpoch(Callback):
    """Tells somebody the accuracy on the validation images after each epoch.

    Args:
        tell: Called in the first process with the epoch, counted from 0, and the accuracy, a fraction of 1. What it
            raises ends the training.
    """

    def __init__(self, tell: Callable[[int, float], object]) -> None:
        self.tell = tell

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Tell it, after the epoch's validation."""
        if trainer.is_global_zero:
            self.tell(trainer.current_epoch, float(trainer.callback_metrics["val/acc"]))
