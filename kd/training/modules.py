"""The LightningModule that trains a classifier, and the base class of the one that distills."""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from kd.data import Batches, Mixing
from kd.errors import UserError
from kd.losses import Objective, Outputs, build_objective
from kd.metrics import ACCURACY, decide, logged_as
from kd.models import CLASSIFIER_KEY, STATE_PREFIX, Classifier, Ensemble, classifier_layer
from kd.randomness import derive_seed, seed_draws
from kd.training.callbacks import TrainingMetrics, batches_of
from kd.training.metrics import MultilabelMetric, build_metric
from kd.training.optimization import Recipe, average_epochs, average_weights
from kd.training.statistics import recompute_statistics

Batch = tuple[Tensor, Tensor]

TOP = 5
CROSS_ENTROPY = build_objective("ce")

MODULE_KEY = "module"
"""Key of a full checkpoint for the whole module: adapters, trained weights and their average."""


class ClassifierModule(LightningModule):
    """Trains a classifier on labels: the teacher's and the baseline's module.

    Args:
        model: The classifier to train; an ensemble can only be validated.
        objective: The loss to minimize.
        recipe: Optimizer and schedule.
        seed: Seed of the randomness of each step (dropout, mixing).
        mixing: Mixes the images of a batch, or ``None``.
        ema: Decay of an exponential moving average of the weights, from 0 to 1, which is then validated and saved in
            their place; see :func:`kd.training.optimization.average_weights`. ``None``: no average.
        has_unlabeled: Whether some of the images have no label (-1).
        metric: The metric of `kd.training.metrics` that chooses the best epoch; it is measured besides accuracy.
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
        metric: str = ACCURACY,
    ) -> None:
        super().__init__()
        self.model = model
        self.metric = metric
        self.mixing = mixing
        self.has_unlabeled = has_unlabeled
        self.recipe = recipe or Recipe()
        self.average: AveragedModel | None = None
        if ema is not None:
            self.average = average_weights(model, ema)
        elif self.recipe.swa is not None:
            self.average = average_epochs(model)
        self._frozen = self._find_frozen() if self.recipe.freeze is not None else []
        if self.recipe.freeze == "backbone":
            for module in self._frozen:
                module.requires_grad_(requires_grad=False)
        self.objective = self._scheduled_objective = objective
        self.seed = seed
        self.max_steps: int | None = None
        num_classes = len(model.description.classes)
        # A loss that is NaN must be reported.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.multilabel = model.description.multilabel
        self.val_acc: Metric = (
            MultilabelMetric(ACCURACY) if self.multilabel else MulticlassAccuracy(num_classes, average="micro")
        )
        # With five classes, top-5 accuracy is always 1.
        has_top5 = num_classes > TOP and not self.multilabel
        self.val_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=TOP) if has_top5 else None
        self.val_score = build_metric(metric, num_classes, multilabel=self.multilabel)
        self.metrics = TrainingMetrics([term.name for term in objective.terms])
        self.last_terms: dict[str, Tensor] = {}
        self._batch_idx = 0
        self._is_frozen = False

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that logs training metrics, which runs before those that save."""
        return [self.metrics]

    def teacher_outputs(self, images: Tensor) -> Outputs | None:
        """Return the teacher's outputs on the images that the student sees; here there is no teacher."""
        return None

    def student_outputs(self, images: Tensor, teacher: Outputs | None) -> Outputs:
        """Return the outputs of the trained network."""
        return Outputs(self.model(images))

    def _outputs(self, images: Tensor) -> tuple[Outputs, Outputs | None]:
        """Return the outputs of student and teacher."""
        # Of the attention kernels, only this one can be differentiated twice, as comparing gradients requires.
        with sdpa_kernel(SDPBackend.MATH) if self.objective.needs_gradients else nullcontext():
            teacher = self.teacher_outputs(images)
            return self.student_outputs(images, teacher), teacher

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Apply the objective's schedules, and seed the draws of this step, independent of earlier draws."""
        self._scheduled_objective = self.objective.at(self.current_epoch, self.trainer.max_epochs or 1)
        seed_draws(derive_seed(self.seed, "step", self.current_epoch, batch_idx, self.global_rank), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the objective on a batch; phases differ only in where the teacher's outputs come from."""
        images, labels = batch
        self._batch_idx = batch_idx
        if self.mixing is not None:
            images, labels = self.mixing(images, labels)
        student, teacher = self._outputs(images)
        labeled = None
        if self.has_unlabeled and self.multilabel:
            labeled = labels.amin(dim=1) >= 0
        elif self.has_unlabeled:
            labeled = labels >= 0 if labels.ndim == 1 else labels.sum(dim=1) > 0
        total, terms = self._scheduled_objective(student, teacher, labels, labeled=labeled)
        with torch.no_grad():
            if self.multilabel:
                correct = (decide(student.logits, multilabel=True) == (labels > 0)).all(dim=1).float()
            else:
                classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
                correct = (student.logits.argmax(dim=1) == classes).float()
            correct = correct if labeled is None else correct[labeled]
        self.last_terms = {"loss": total.detach()} | terms
        weight = self._batch_weight(batch_idx)
        self.metrics.update(self.last_terms | ({"acc": correct.mean()} if len(correct) else {}), weight=weight)
        # The mean gradient over processes and accumulated batches then equals that of one batch with all images.
        if self._trainer is not None:
            count, batches = self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches)
            weight = self._batch_weight(batch_idx, accumulate=count, batches=batches)
        return total if weight == 1 else total * weight

    def _batch_weight(self, batch_idx: int, **accumulation: int) -> float:
        """Return the weight of a batch, see :meth:`kd.data.Batches.batch_weight`; 1 with loaders of the user's own."""
        data = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's
        return data.batch_weight(batch_idx, **accumulation) if isinstance(data, Batches) else 1.0

    def dry_run(self) -> None:
        """Compute the objective and its gradient on two random images with label 0, and discard them.

        Raises:
            UserError: If that fails, such as for an operation that can't be differentiated twice.
        """
        size, architecture = self.model.description.image_size, self.model.description.architecture
        try:
            shape = (2, len(self.model.description.classes)) if self.multilabel else (2,)
            labels = torch.zeros(shape, dtype=torch.float32 if self.multilabel else torch.int64)
            total, _ = self.objective.at(0, 1)(*self._outputs(torch.rand(2, 3, size, size)), labels)
            torch.autograd.backward(total)
        except RuntimeError as error:
            names = " ".join(term.name for term in self.objective.terms)
            raise UserError(f"--loss {names}: can't train {architecture} with this objective: {error}") from error
        self.zero_grad()

    def _find_frozen(self) -> list[nn.Module]:
        """Return the layers with parameters or statistics of their own besides the classifier layer."""
        network = self.model.get_submodule("network")
        head = classifier_layer(network)
        return [
            layer
            for name, layer in network.named_modules()
            if name != head and (not list(layer.children()) or list(layer.parameters(recurse=False)))
        ]

    def on_train_start(self) -> None:
        """Freeze layers, as a resumed epoch has no start, and set the learning rate of a schedule that was extended."""
        self.on_train_epoch_start()
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                # Of a run that goes on as before, it is the same.
                group["lr"] = rate * scheduler.lr_lambdas[0](scheduler.last_epoch)

    def on_train_epoch_start(self) -> None:
        """Freeze layers in evaluation mode, or train them."""
        epochs = self.recipe.freeze
        self._is_frozen = epochs == "backbone" or (isinstance(epochs, int) and self.current_epoch < epochs)
        for layer in self._frozen:
            layer.train(not self._is_frozen)
            # Processes that share gradients expect those of all layers; they are discarded.
            if epochs != "backbone" and self.trainer.world_size == 1:
                for weight in layer.parameters(recurse=False):
                    weight.requires_grad_(not self._is_frozen)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Discard the gradients of frozen layers."""
        for layer in self._frozen if self._is_frozen else ():
            for weight in layer.parameters(recurse=False):
                weight.grad = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, then their moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None and self.recipe.swa is None:
            self.average.update_parameters(self.model)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the weights at the end of an epoch to their average."""
        first, is_last = self.recipe.swa, batch_idx + 1 == self.trainer.num_training_batches or self.trainer.should_stop
        if self.average is not None and first is not None and is_last and self.current_epoch + 1 >= first:
            self.average.update_parameters(self.model)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and saved: the average, as soon as there is one, or the trained one."""
        if self.average is None or (self.recipe.swa is not None and int(self.average.n_averaged) == 0):
            return self.model
        return self.average

    def on_validation_epoch_start(self) -> None:
        """Recompute the statistics of batch normalization on training images, if the recipe says so."""
        if self.recipe.update_bn and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            recompute_statistics(self.evaluated, batches_of(self.trainer), self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Update the validation metrics, and return the logits ``(B, C)``.

        The loss is cross-entropy with the labels in every phase, so that phases can be compared; with several labels an
        image, it is binary.
        """
        images, labels = batch
        logits: Tensor = self.evaluated(images).float()
        measured_loss = F.binary_cross_entropy_with_logits if self.multilabel else F.cross_entropy
        self.val_loss.update(measured_loss(logits, labels), weight=len(labels))
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        measured = (("val/acc", self.val_acc), ("val/top5", self.val_top5), (logged_as(self.metric), self.val_score))
        for name, metric in measured:
            if metric is not None:
                metric.update(logits, labels)
                self.log(name, metric, on_step=False, on_epoch=True)
        self.compare_with_teacher(images, logits, batch_idx)
        return logits

    def compare_with_teacher(self, images: Tensor, logits: Tensor, batch_idx: int) -> None:
        """Measure the agreement with the teacher; here there is no teacher."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and the learning rate schedule, which advances with each optimizer step."""
        # Lightning can't clip float16's scaled gradients with a fused optimizer.
        optimizer = self.recipe.build_optimizer(self, fused=self.trainer.precision != "16-mixed")
        # Lightning's own count of the batches would start the first epoch before a resumed epoch is restored.
        batches, limit = len(batches_of(self.trainer).train_dataloader()), self.trainer.limit_train_batches or 1.0
        batches = max(1, int(batches * limit)) if isinstance(limit, float) else min(batches, limit)
        steps_per_epoch = batches / self.trainer.accumulate_grad_batches
        total_steps = math.ceil(steps_per_epoch) * (self.trainer.max_epochs or 1)
        if self.max_steps is not None:
            total_steps = min(total_steps, self.max_steps)
        scheduler = self.recipe.build_scheduler(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Turn it into a plain classifier's checkpoint, with architecture, classes, image size and accuracy.

        A full checkpoint also holds the whole module, under a key of its own; shared weights are stored once.
        """
        accuracy = self.trainer.callback_metrics.get("val/acc")
        measured = {"val_acc": None if accuracy is None else float(accuracy)}
        checkpoint[CLASSIFIER_KEY] = self.model.description.plain() | measured
        state = checkpoint["state_dict"]
        if "optimizer_states" in checkpoint:
            checkpoint[MODULE_KEY] = state
        prefix = STATE_PREFIX if self.evaluated is self.model else "average.module."
        checkpoint["state_dict"] = {
            STATE_PREFIX + name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the whole module."""
        checkpoint["state_dict"] = checkpoint.pop(MODULE_KEY)
