"""Training metrics, throughput, and the check for finite values."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from kd.data import Batches
from kd.errors import NotFiniteError

_LOG_STEPS = 50
METRICS_KEY = "training_metrics"
"""Key of a checkpoint for the sums of the training metrics."""

_CHECK_STEPS = 50
"""Steps between two checks for finite values on a device for which the program would have to wait."""


def batches_of(trainer: Trainer) -> Batches:
    """Return a trainer's data module."""
    return cast("Batches", trainer.datamodule)  # type: ignore[attr-defined]  # Lightning sets it in fit and validate


class TrainingMetrics(Callback):
    """Logs means of the training loss, of its terms and of the accuracy over the batches since they were last logged.

    Logging each step would take longer than a small step. Sums stay on the device until they are logged; ``latest``
    holds the metrics logged last, such as ``train/loss``, ``train/acc`` and ``lr``.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        self.names = [*terms, "loss", "acc"]
        self.latest: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the sums over all processes, and the metrics logged last."""
        checkpoint[METRICS_KEY] = {"totals": self._reduced_totals(trainer, pl_module.device), "latest": self.latest}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the state; each process, of any number, gets an equal share of the sums."""
        self.latest = checkpoint[METRICS_KEY]["latest"]
        sums, weights = (torch.tensor(total) / trainer.world_size for total in checkpoint[METRICS_KEY]["totals"])
        self._sums = dict(zip(self.names, sums, strict=True))
        self._weights = dict(zip(self.names, weights.tolist(), strict=True))

    def update(self, values: Mapping[str, Tensor], *, weight: float = 1.0) -> None:
        """Add scalars of a batch by name; names may be missing, such as the accuracy of a batch without labels."""
        for name, value in values.items():
            weighted = value if weight == 1 else value * weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def totals(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the sums and the sums of weights, ``(N,)`` each in the order of ``names``."""
        zero = torch.zeros((), device=device)
        sums = torch.stack([self._sums.get(name, zero).float() for name in self.names])
        return sums, torch.tensor([self._weights.get(name, 0.0) for name in self.names], device=device)

    def _reduced_totals(self, trainer: Trainer, device: torch.device) -> list[list[float]]:
        return [trainer.strategy.reduce(total, reduce_op="sum").tolist() for total in self.totals(device)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log every 50 steps, at least four times an epoch, and at an epoch's end."""
        batches = int(trainer.num_training_batches)
        every = max(1, min(_LOG_STEPS, batches // 4))
        if (batch_idx + 1) % every and batch_idx + 1 != batches and not trainer.should_stop:
            return
        means = zip(self.names, *self._reduced_totals(trainer, pl_module.device), strict=True)
        self._sums, self._weights = {}, {}
        # The accuracy and terms that need labels are missing where no image had a label.
        self.latest = {f"train/{name}": total / weight for name, total, weight in means if weight}
        self.latest["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=trainer.global_step - 1)


def current_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of the last validation and the training metrics logged last."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it in a connector
        metrics |= callback.latest if isinstance(callback, TrainingMetrics) else {}
    return metrics


class Throughput(Callback):
    """Measures and logs training images per second over all processes, excluding validation."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._images_before, self._seconds_before = 0, 0.0
        self._start = self._last = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return the images and seconds so far."""
        return {"images": self.images, "seconds": self.seconds, "wall_seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]
        self._start -= state_dict["wall_seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a resumed epoch has no start of its own."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._images_before, self._seconds_before = self.images, self.seconds
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch."""
        now = time.perf_counter()
        self.images += len(batch[1]) * trainer.world_size
        self.seconds += now - self._last
        self._last = now

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's speed."""
        images, seconds = self.images - self._images_before, self.seconds - self._seconds_before
        for logger in trainer.loggers:
            logger.log_metrics({"images_per_second": images / max(seconds, 1e-9)}, step=trainer.global_step - 1)

    @property
    def wall_seconds(self) -> float:
        """Wall time of the training, including validation and the time before it was resumed."""
        return time.perf_counter() - self._start

    @property
    def images_per_second(self) -> float:
        """Mean speed of the training so far."""
        return self.images / max(self.seconds, 1e-9)


class StopOnNonFinite(Callback):
    """Raises :class:`NotFiniteError` with the step and the terms when the loss or the gradient is infinite or NaN.

    On a CPU each step is checked before the weights are updated. Elsewhere a check would wait for the device, so flags
    are collected there and checked every 50 steps and before a checkpoint is saved. Only the gradients of the first and
    the last parameter are checked: non-finite values in the backward pass propagate to the first.
    """

    def __init__(self) -> None:
        self._flags: list[tuple[int, float, tuple[str, ...], Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Record which values are finite, and check them on a CPU."""
        # float16 scales its gradients until they overflow, and skips such a step.
        if trainer.precision == "16-mixed":
            return
        module: Any = pl_module
        terms: dict[str, Tensor] = module.last_terms
        gradients = [parameter.grad for parameter in module.model.parameters() if parameter.grad is not None]
        values = [*terms.values(), *(gradient.sum() for gradient in (gradients[:1] + gradients[-1:]))]
        names = (*terms, "the gradient", "the gradient")
        flags = torch.stack([value.detach().float() for value in values]).isfinite()
        self._flags.append((trainer.global_step, float(optimizer.param_groups[0]["lr"]), names, flags))
        if pl_module.device.type == "cpu" or len(self._flags) >= _CHECK_STEPS:
            self._check()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check before a checkpoint is saved."""
        self._check()

    def _check(self) -> None:
        recorded, self._flags = self._flags, []
        for step, learning_rate, names, flags in recorded:
            failed = [name for name, is_finite in zip(names, flags.tolist(), strict=False) if not is_finite]
            if failed:
                # The loss is the sum of its terms, which are more specific.
                terms = [name for name in dict.fromkeys(failed) if name != "loss"] or ["the loss"]
                raise NotFiniteError(
                    f"training diverged in step {step:,} (counted from 0): {', '.join(terms)} not finite at learning "
                    f"rate {learning_rate:.3g}; try a smaller --learning_rate, a longer --warmup_epochs or "
                    "--gradient_clip; earlier checkpoints are intact"
                )
