"""Callbacks of a training: metrics, speed, early ends."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from kd.errors import NotFiniteError

_LOG_STEPS = 50
_CHECK_STEPS = 50
"""Steps between two checks for finite values where a check means waiting for the device."""


class TrainingMetrics(Callback):
    """Logs means of the training loss, of its terms and of the accuracy over the batches since they were last logged.

    To log each step would cost more than a small step does. Sums stay on the device until they are logged.

    Args:
        terms: Names of the terms.

    Attributes:
        latest: What was logged last, such as ``train/loss``, ``train/acc`` and ``lr``.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        self.names = [*terms, "loss", "acc"]
        self.latest: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and what was logged last."""
        return {"sums": dict(self._sums), "weights": dict(self._weights), "latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._sums, self._weights = dict(state_dict["sums"]), dict(state_dict["weights"])
        self.latest = state_dict["latest"]

    def update(self, values: Mapping[str, Tensor], *, weight: float = 1.0) -> None:
        """Add scalars of a batch by name; a name may be missing, as the accuracy of a batch without labels is."""
        for name, value in values.items():
            weighted = value if weight == 1 else value * weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def totals(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the sums and the sums of weights, ``(N,)`` each in the order of ``names``, and start again."""
        zero = torch.zeros((), device=device)
        sums = torch.stack([self._sums.get(name, zero).float() for name in self.names])
        weights = torch.tensor([self._weights.get(name, 0.0) for name in self.names], device=device)
        self._sums, self._weights = {}, {}
        return sums, weights

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        """Log every 50 steps, at least four times an epoch, and at an epoch's end."""
        batches = int(trainer.num_training_batches)
        every = max(1, min(_LOG_STEPS, batches // 4))
        if (batch_idx + 1) % every and batch_idx + 1 != batches and not trainer.should_stop:
            return
        sums, weights = (trainer.strategy.reduce(one, reduce_op="sum") for one in self.totals(pl_module.device))
        means = zip(self.names, sums.tolist(), weights.tolist(), strict=True)
        # The accuracy and terms that need labels are missing where no image had one.
        self.latest = {f"train/{name}": total / weight for name, total, weight in means if weight}
        self.latest["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=trainer.global_step - 1)


def latest_metrics(module: LightningModule) -> dict[str, float]:
    """Return the training metrics that a module logged last; none if it has no :class:`TrainingMetrics`."""
    metrics = getattr(module, "metrics", None)
    return metrics.latest if isinstance(metrics, TrainingMetrics) else {}


class Throughput(Callback):
    """Measures and logs training images per second over all processes, without the time of validation."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self._earlier_wall_seconds = 0.0
        self._wall_start = time.perf_counter()
        self._epoch_images = 0
        self._epoch_start = 0.0
        self._last_batch_end = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the images and seconds so far."""
        return {"images": self.images, "seconds": self.seconds, "wall_seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add to what was counted before."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]
        self._earlier_wall_seconds = state_dict["wall_seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; the epoch that a resumed run continues has no start of its own."""
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
        """Time of the training, with validation and the time before it was resumed."""
        return self._earlier_wall_seconds + time.perf_counter() - self._wall_start

    @property
    def images_per_second(self) -> float:
        """Speed over the whole training."""
        return self.images / max(self.seconds, 1e-9)


class StopAfterSteps(Callback):
    """Ends training after a number of optimizer steps, with a validation, even within an epoch.

    Lightning's own ``max_steps`` ends without a validation, and such a run can't be resumed to the same result.

    Args:
        steps: Number of optimizer steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Stop where all steps were taken before the run was resumed."""
        trainer.should_stop = trainer.global_step >= self.steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Stop; Lightning validates first."""
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


class OnEpochEnd(Callback):
    """Calls a function with the validation accuracy after each epoch.

    Args:
        function: Called in the first process with the epoch, from 0, and the accuracy, a fraction of 1. An exception
            from it ends the training.
    """

    def __init__(self, function: Callable[[int, float], object]) -> None:
        self.function = function

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Call it, after the epoch's validation."""
        if trainer.is_global_zero:
            self.function(trainer.current_epoch, float(trainer.callback_metrics["val/acc"]))


class StopOnNonFinite(Callback):
    """Ends training when the loss or the gradient is infinite or NaN, naming the step and the terms.

    On a CPU each step is checked, before the weights move. Elsewhere a check would make the program wait for the
    device, so that flags are gathered there and checked every 50 steps, and before anything is saved. Of the gradient,
    the first and the last parameters' are checked: what goes wrong in the backward pass arrives at the first.
    """

    def __init__(self) -> None:
        self._flags: list[tuple[int, float, tuple[str, ...], Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note which values are finite, and check them where that costs nothing."""
        # float16 scales its gradients until they overflow, and skips such a step.
        if trainer.precision == "16-mixed":
            return
        terms: dict[str, Tensor] = getattr(pl_module, "last_terms", {})
        model = getattr(pl_module, "model", pl_module)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        values = [*terms.values(), *(gradient.sum() for gradient in (gradients[:1] + gradients[-1:]))]
        names = (*terms, "the gradient", "the gradient")
        flags = torch.stack([value.detach().float() for value in values]).isfinite()
        self._flags.append((trainer.global_step, float(optimizer.param_groups[0]["lr"]), names, flags))
        if pl_module.device.type == "cpu" or len(self._flags) >= _CHECK_STEPS:
            self._check()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Check before anything is saved."""
        self._check()

    def _check(self) -> None:
        noted, self._flags = self._flags, []
        for step, learning_rate, names, flags in noted:
            wrong = [name for name, is_finite in zip(names, flags.tolist(), strict=False) if not is_finite]
            if wrong:
                # The loss is the sum of its terms, which say more.
                terms = [name for name in dict.fromkeys(wrong) if name != "loss"] or ["the loss"]
                raise NotFiniteError(
                    f"training diverged in step {step:,} (counted from 0): {', '.join(terms)} not finite at learning "
                    f"rate {learning_rate:.3g}; try a smaller --learning_rate, a longer --warmup_epochs or "
                    "--gradient_clip; earlier checkpoints are intact"
                )
