"""The two LightningModules, and the one training step that they share."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from kd.losses import Objective, Outputs, build_objective
from kd.models import CLASSIFIER_KEY, Classifier
from kd.randomness import derive_seed
from kd.training.optimization import Recipe
from kd.training.teacher import FrozenTeacher

Batch = tuple[Tensor, Tensor]

TOP = 5
LOG_EVERY = 50
CROSS_ENTROPY = build_objective("ce")


class ClassifierModule(LightningModule):
    """A classifier that learns from labels; teacher and baseline are trained by it.

    Args:
        model: The classifier to train.
        objective: What to minimise.
        recipe: How.
        seed: What the randomness of each step (dropout) hangs on.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        objective: Objective = CROSS_ENTROPY,
        recipe: Recipe | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.recipe = recipe or Recipe()
        self.seed = seed
        num_classes = len(model.description.classes)
        # A loss that is not a number must show.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        # Right by chance five times in five is no measure of anything.
        self.val_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=TOP) if num_classes > TOP else None
        self.train_metrics: dict[str, float] = {}
        self._means = _RunningMeans()
        self._objective_now = objective

    def teacher_outputs(self, images: Tensor) -> Outputs | None:  # noqa: ARG002 (what DistillationModule looks at)
        """Return what a teacher makes of the images that the student sees: here there is none."""
        return None

    def on_train_epoch_start(self) -> None:
        """Let weights and hyperparameters that have a schedule be those of this epoch."""
        self._objective_now = self.objective.at(self.current_epoch, self.trainer.max_epochs or 1)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002 (Lightning's signature)
        """Let what this step draws hang on (seed, step, rank), not on what was drawn before."""
        torch.manual_seed(derive_seed(self.seed, "step", self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002 (Lightning's signature)
        """Compute the objective on a batch; phases differ in where the teacher's outputs come from, and in no more."""
        images, labels = batch
        student = Outputs(logits=self.model(images), images=images)
        total, terms = self._objective_now(student, self.teacher_outputs(images), labels)
        with torch.no_grad():
            correct = (student.logits.argmax(dim=1) == labels).float().mean()
        self._means.add({"loss": total.detach(), **terms, "acc": correct})
        return total

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Log means over the batches since the last time; to log each step would cost more than a small step does."""
        batches = int(self.trainer.num_training_batches)
        # Often enough for a curve within a short epoch, seldom enough to cost nothing in a long one.
        every = max(1, min(LOG_EVERY, batches // 4))
        is_last = batch_idx + 1 == batches or 0 < self.trainer.max_steps <= self.trainer.global_step
        if (batch_idx + 1) % every and not is_last:
            return
        means = {name: self.trainer.strategy.reduce(value, reduce_op="mean") for name, value in self._means.take()}
        self.train_metrics = {f"train/{name}": float(value) for name, value in means.items()}
        self.train_metrics["lr"] = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.logger is not None:
            self.logger.log_metrics(self.train_metrics, step=self.global_step - 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count what is right; the loss is cross-entropy with the labels in every phase, so that phases compare."""
        images, labels = batch
        logits = self.model(images).float()
        self.val_loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.val_acc.update(logits, labels)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True)
        if self.val_top5 is not None:
            self.val_top5.update(logits, labels)
            self.log("val/top5", self.val_top5, on_step=False, on_epoch=True)
        self.compare_with_teacher(images, logits, batch_idx)

    def compare_with_teacher(self, images: Tensor, logits: Tensor, batch_idx: int) -> None:
        """Measure how far a teacher would agree: here there is none."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule; the learning rate moves with each optimizer step."""
        optimizer = self.recipe.build_optimizer(self.model)
        steps_per_epoch = self._count_batches() / self.trainer.accumulate_grad_batches
        total_steps = math.ceil(steps_per_epoch) * (self.trainer.max_epochs or 1)
        if self.trainer.max_steps > 0:
            total_steps = min(total_steps, self.trainer.max_steps)
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
        """Add what it takes to use the classifier: architecture, classes, size, normalisation, accuracy."""
        accuracy = self.trainer.callback_metrics.get("val/acc")
        measured = {"val_acc": None if accuracy is None else float(accuracy)}
        checkpoint[CLASSIFIER_KEY] = self.model.description.plain() | measured


class DistillationModule(ClassifierModule):
    """A student that learns from a teacher.

    Its checkpoint is that of a plain classifier: the teacher is not in it.

    Args:
        teacher: Who answers.
        student: Who learns.
        objective: What the student minimises.
        recipe: How.
        seed: What the randomness of each step hangs on.
        teacher_acc: The teacher's accuracy on the validation images, to be drawn beside the student's.
    """

    def __init__(
        self,
        *,
        teacher: FrozenTeacher,
        student: Classifier,
        objective: Objective,
        recipe: Recipe | None = None,
        seed: int = 0,
        teacher_acc: float | None = None,
    ) -> None:
        super().__init__(student, objective=objective, recipe=recipe, seed=seed)
        self.teacher = teacher
        self.teacher_acc = teacher_acc
        self.val_agreement = MeanMetric()
        self._teacher_decisions: dict[int, Tensor] = {}

    def setup(self, stage: str) -> None:  # noqa: ARG002 (Lightning's signature)
        """Forget the teacher's answers of an earlier run: its validation images may have been others."""
        self._teacher_decisions.clear()

    def on_fit_start(self) -> None:
        """Move the teacher to where the student is; Lightning does not see it."""
        self.teacher.to(device=self.device, dtype=next(self.model.parameters()).dtype)

    def on_validation_start(self) -> None:
        """Move the teacher for a validation without a fit, too."""
        self.on_fit_start()

    def teacher_outputs(self, images: Tensor) -> Outputs:
        """Ask the teacher about the very images that the student sees."""
        return self.teacher(images)

    def compare_with_teacher(self, images: Tensor, logits: Tensor, batch_idx: int) -> None:
        """Measure the share of images on which the student's decision is the teacher's.

        The validation batches are the same in every epoch, so that the teacher is asked in the first one only.
        """
        if batch_idx not in self._teacher_decisions:
            self._teacher_decisions[batch_idx] = self.teacher(images).logits.argmax(dim=1)
        self.val_agreement.update((logits.argmax(dim=1) == self._teacher_decisions[batch_idx]).float())
        self.log("val/agreement", self.val_agreement, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        """Draw the teacher's accuracy as a line beside the student's."""
        if self.teacher_acc is not None:
            self.log("teacher/acc", self.teacher_acc, sync_dist=True)


class _RunningMeans:
    """Means of tensors by name, without a synchronisation with the device until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self) -> list[tuple[str, Tensor]]:
        means = [(name, value / self._count) for name, value in self._sums.items()]
        self._sums, self._count = {}, 0
        return means
