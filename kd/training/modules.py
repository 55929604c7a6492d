"""The module that trains a classifier: teacher, student alone, and with a teacher's answers the distilled student."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from kd.data import Batches, Mixing
from kd.errors import UserError
from kd.losses import Objective, Outputs, build_objective
from kd.models import CLASSIFIER_KEY, STATE_PREFIX, Classifier, Ensemble
from kd.randomness import derive_seed, seed_draws
from kd.training.averages import RunningMeans, average_of_weights
from kd.training.optimization import Recipe

Batch = tuple[Tensor, Tensor]

TOP = 5
LOG_EVERY = 50
CROSS_ENTROPY = build_objective("ce")

RESUME_KEY = "resume"
"""Where a checkpoint that is to be resumed keeps what is no part of the classifier."""

MEANS_KEY = "means"
"""Where it keeps what was summed up since the last time that means were logged."""

# What the weights that are trained go by there, if it is their average that is shipped, and that average in the module.
_TRAINED = "trained."
_AVERAGED = "average.module."


class ClassifierModule(LightningModule):
    """A classifier that learns from labels; teacher and baseline are trained by it.

    Args:
        model: The classifier to train; several that answer as one can be measured.
        objective: What to minimize.
        recipe: How.
        seed: What the randomness of each step (dropout, mixing) hangs on.
        mixing: Mixes the images of a batch, or ``None``.
        ema: Decay of an exponential moving average of the weights, from 0 to 1: this average is what is validated and
            shipped. In the first steps the decay is smaller, so that the first weights do not linger. ``None``: none.
        has_unlabeled: Whether some of the images have no label (-1).
    """

    def __init__(
        self,
        model: Classifier | Ensemble,
        *,
        objective: Objective = CROSS_ENTROPY,
        recipe: Recipe | None = None,
        seed: int = 0,
        mixing: Mixing | None = None,
        ema: float | None = None,
        has_unlabeled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.mixing = mixing
        self.has_unlabeled = has_unlabeled
        self.average: AveragedModel | None = None
        if ema is not None:
            self.average = average_of_weights(model, ema)
        self.objective = objective
        self.recipe = recipe or Recipe()
        self.seed = seed
        self.max_steps: int | None = None
        num_classes = len(model.description.classes)
        # A loss that is not a number must show.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        # Right by chance five times in five is no measure of anything.
        self.val_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=TOP) if num_classes > TOP else None
        self.train_metrics: dict[str, float] = {}
        self.last_terms: dict[str, Tensor] = {}
        self._batch_idx = 0
        self._means = RunningMeans()
        self._names = [term.name for term in objective.terms]
        self._objective_now = objective

    @property
    def shipped(self) -> Classifier | Ensemble:
        """The classifier that is validated and shipped: the one that is trained, or the average of its weights."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]  # its copy

    def teacher_outputs(self, images: Tensor) -> Outputs | None:  # noqa: ARG002 (what DistillationModule looks at)
        """Return what a teacher makes of the images that the student sees: here there is none."""
        return None

    def student_outputs(self, images: Tensor, teacher: Outputs | None) -> Outputs:  # noqa: ARG002 (likewise)
        """Return what the network that is trained makes of the images."""
        return Outputs(self.model(images))

    def configure_callbacks(self) -> list[Callback]:
        """Log at the end of a step before the callbacks that save: what is saved was logged."""
        return [_LogMeans()]

    def on_train_start(self) -> None:
        """Let the schedules stand where a resumed epoch was left: it does not begin once more."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Let weights and hyperparameters that have a schedule be those of this epoch."""
        self._objective_now = self.objective.at(self.current_epoch, self.trainer.max_epochs or 1)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002 (Lightning's signature)
        """Let what this step draws hang on (seed, step, rank), not on what was drawn before."""
        seed = derive_seed(self.seed, "step", self.current_epoch, batch_idx, self.global_rank)
        seed_draws(seed, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the objective on a batch; phases differ in where the teacher's outputs come from, and in no more."""
        images, labels = batch
        self._batch_idx = batch_idx
        if self.mixing is not None:
            images, labels = self.mixing(images, labels)
        with self._differentiable():
            teacher = self.teacher_outputs(images)
            student = self.student_outputs(images, teacher)
        labeled = None
        if self.has_unlabeled:
            labeled = labels >= 0 if labels.ndim == 1 else labels.sum(dim=1) > 0
        total, terms = self._objective_now(student, teacher, labels, labeled=labeled)
        with torch.no_grad():
            decisions = labels if labels.ndim == 1 else labels.argmax(dim=1)
            correct = (student.logits.argmax(dim=1) == decisions).float()
            known = correct if labeled is None else correct[labeled]
        self.last_terms = {"loss": total.detach()} | terms
        share = self._share(batch_idx)
        self._means.add(self.last_terms | ({"acc": known.mean()} if len(known) else {}), share=share)
        # The gradient's mean over the processes is then that of one process with all of the images.
        return total if share == 1 else total * share

    def _share(self, batch_idx: int) -> float:
        """Return how much the batch counts beside those of the other processes."""
        data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        return data.share(batch_idx) if isinstance(data, Batches) and self.trainer.world_size > 1 else 1.0

    def rehearse(self) -> None:
        """Compute the objective and its gradient on two random images with labels 0, and forget them.

        Raises:
            UserError: If that can't be done, such as to differentiate an operation twice.
        """
        size, architecture = self.model.description.image_size, self.model.description.architecture
        images, labels = torch.rand(2, 3, size, size), torch.zeros(2, dtype=torch.long)
        try:
            with self._differentiable():
                teacher = self.teacher_outputs(images)
                student = self.student_outputs(images, teacher)
            total, _ = self.objective.at(0, 1)(student, teacher, labels)
            torch.autograd.backward(total)
        except RuntimeError as error:
            names = " ".join(term.name for term in self.objective.terms)
            raise UserError(f"--loss {names}: {architecture} can't be trained so: {error}") from error
        self.zero_grad()

    def _differentiable(self) -> AbstractContextManager[None]:
        """Choose the kernel of attention that can be differentiated twice, where gradients are compared."""
        return sdpa_kernel(SDPBackend.MATH) if self.objective.needs_gradients else nullcontext()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make a step, and let the average follow it."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def log_means(self, batch_idx: int) -> None:
        """Log means over the batches since the last time; to log each step would cost more than a small step does."""
        batches = int(self.trainer.num_training_batches)
        # Often enough for a curve within a short epoch, seldom enough to cost nothing in a long one.
        every = max(1, min(LOG_EVERY, batches // 4))
        is_last = batch_idx + 1 == batches or (
            self.max_steps is not None and self.trainer.global_step >= self.max_steps
        )
        if (batch_idx + 1) % every and not is_last:
            return
        totals, counts = self._means.take([*self._names, "loss", "acc"], device=self.device)
        totals, counts = (self.trainer.strategy.reduce(one, reduce_op="sum") for one in (totals, counts))
        means = zip([*self._names, "loss", "acc"], totals.tolist(), counts.tolist(), strict=True)
        # A term that looks at labels is missing where no image had one.
        self.train_metrics = {f"train/{name}": total / count for name, total, count in means if count}
        self.train_metrics["lr"] = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        for logger in self.loggers:
            logger.log_metrics(self.train_metrics, step=self.global_step - 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count what is right, and return the logits ``(B, C)``.

        The loss is cross-entropy with the labels in every phase, so that phases compare.
        """
        images, labels = batch
        logits: Tensor = self.shipped(images).float()
        self.val_loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.val_acc.update(logits, labels)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True)
        if self.val_top5 is not None:
            self.val_top5.update(logits, labels)
            self.log("val/top5", self.val_top5, on_step=False, on_epoch=True)
        self.compare_with_teacher(images, logits, batch_idx)
        return logits

    def compare_with_teacher(self, images: Tensor, logits: Tensor, batch_idx: int) -> None:
        """Measure how far a teacher would agree: here there is none."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule; the learning rate moves with each optimizer step."""
        # Lightning can't clip the scaled gradients of float16 with a fused one.
        optimizer = self.recipe.build_optimizer(self, fused=self.trainer.precision != "16-mixed")
        steps_per_epoch = self._count_batches() / self.trainer.accumulate_grad_batches
        total_steps = math.ceil(steps_per_epoch) * (self.trainer.max_epochs or 1)
        if self.max_steps is not None:
            total_steps = min(total_steps, self.max_steps)
        scheduler = self.recipe.build_scheduler(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _count_batches(self) -> int:
        """Count the batches of an epoch; Lightning, if asked, would begin the first epoch before a resume is known."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return int(self.trainer.estimated_stepping_batches) // (self.trainer.max_epochs or 1)
        batches, limit = len(data.train_dataloader()), self.trainer.limit_train_batches or 1.0
        return max(1, int(batches * limit)) if isinstance(limit, float) else min(batches, limit)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make it a plain classifier's, with what it takes to use it: architecture, classes, size, accuracy.

        What else a resume needs (adapters, the weights behind an average) stands apart in a whole checkpoint, and does
        not stand in one of weights alone.
        """
        accuracy = self.trainer.callback_metrics.get("val/acc")
        measured = {"val_acc": None if accuracy is None else float(accuracy)}
        checkpoint[CLASSIFIER_KEY] = self.model.description.plain() | measured
        state = checkpoint["state_dict"]
        if self.average is not None:
            state = _renamed(_renamed(state, STATE_PREFIX, _TRAINED), _AVERAGED, STATE_PREFIX)
        shipped = {name: value for name, value in state.items() if name.startswith(STATE_PREFIX)}
        rest = {name: value for name, value in state.items() if name not in shipped}
        checkpoint["state_dict"] = shipped
        if "optimizer_states" in checkpoint:
            checkpoint[RESUME_KEY] = rest
            checkpoint[MEANS_KEY] = self._means.state() | {"logged": self.train_metrics}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put everything back into its place."""
        means = checkpoint.pop(MEANS_KEY)
        self.train_metrics = means.pop("logged")
        self._means.load(means)
        state = checkpoint["state_dict"]
        if self.average is not None:
            state = _renamed(state, STATE_PREFIX, _AVERAGED)
        checkpoint["state_dict"] = _renamed(state | checkpoint.pop(RESUME_KEY, {}), _TRAINED, STATE_PREFIX)


class _LogMeans(Callback):
    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        """Log."""
        if isinstance(pl_module, ClassifierModule):
            pl_module.log_means(batch_idx)


def _renamed(state: Mapping[str, Tensor], prefix: str, other: str) -> dict[str, Tensor]:
    """Give weights another prefix."""
    return {
        other + name.removeprefix(prefix) if name.startswith(prefix) else name: value for name, value in state.items()
    }
