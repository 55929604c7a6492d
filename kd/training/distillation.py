"""The LightningModule that distills: the same training step, with a teacher's outputs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from kd.data import Mixing
from kd.errors import UserError
from kd.losses import FeatureLoss, Objective, Outputs, Pair
from kd.metrics import ACCURACY, decide
from kd.models import Classifier, FeatureReader, Survey, survey
from kd.randomness import seeded
from kd.teachers import FrozenTeacher, LogitStore
from kd.training.callbacks import batches_of
from kd.training.modules import ClassifierModule
from kd.training.optimization import Recipe


class DistillationModule(ClassifierModule):
    """Trains a student with a teacher's outputs.

    Its checkpoint is a plain classifier's, without the teacher.

    Args:
        teacher: The teacher.
        student: The student.
        objective: The loss to minimize.
        recipe: Optimizer and schedule.
        seed: Seed of the randomness of each step, and of the adapters' initial weights.
        teacher_acc: The teacher's validation accuracy, logged beside the student's.
        teacher_decisions: The teacher's predicted classes ``(N,)`` in the order of the validation images; ``None``
            computes them in the first validation.
        mixing: Mixes the images of a batch; the teacher sees the mixed images too.
        ema: Decay of an average of the student's weights, see :class:`ClassifierModule`.
        has_unlabeled: Whether some of the images have no label.
        metric: The metric that chooses the best epoch, see :class:`ClassifierModule`.
        open_store: Opens the store of the teacher's logits for ``(rank, world_size)``: logits are read from it, and
            written where they are missing; ``None`` always computes them. It is not used where images are mixed, or
            features or gradients are compared.

    Raises:
        UserError: If a term compares features that can't be read or compared.
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
        teacher_decisions: Tensor | None = None,
        mixing: Mixing | None = None,
        ema: float | None = None,
        has_unlabeled: bool = False,
        metric: str = ACCURACY,
        open_store: Callable[[int, int], LogitStore | None] | None = None,
    ) -> None:
        if objective.feature_terms:
            surveys = survey(student), teacher.survey()
            pairs = {
                term.name: _pair_features(term.name, term.loss, *surveys)
                for term in objective.terms
                if isinstance(term.loss, FeatureLoss)
            }
            # Adapters of one seed have the same initial weights, independent of earlier draws.
            with seeded(seed, "adapters"):
                objective = objective.bind(pairs)
        all_pairs = [pair for term in objective.feature_terms for pair in term.pairs]
        student_nodes = list(dict.fromkeys(pair.student for pair in all_pairs))
        teacher_nodes = list(dict.fromkeys(pair.teacher for pair in all_pairs))
        super().__init__(
            student,
            objective=objective,
            recipe=recipe,
            seed=seed,
            mixing=mixing,
            ema=ema,
            has_unlabeled=has_unlabeled,
            metric=metric,
        )
        self.adapters = nn.ModuleList(
            adapter for term in objective.feature_terms for adapter in term.adapters if adapter is not None
        )
        self._reader = FeatureReader(student, student_nodes) if student_nodes else None
        self.teacher = teacher.with_outputs(nodes=teacher_nodes, gradients=objective.needs_gradients)
        is_storable = mixing is None and not (teacher_nodes or objective.needs_gradients)
        self._open_store = open_store if is_storable else None
        self.store: LogitStore | None = None
        self.teacher_acc = teacher_acc
        self.val_agreement = MeanMetric()
        self._all_teacher_decisions = teacher_decisions
        self._teacher_decisions: dict[int, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Select this process's part of the teacher's predicted classes."""
        self._teacher_decisions.clear()
        if self._all_teacher_decisions is not None:
            data = batches_of(self.trainer)
            part = self._all_teacher_decisions[data.validation_indices(self.global_rank, self.trainer.world_size)]
            self._teacher_decisions.update(enumerate(torch.split(part, data.batch_size)))

    def on_fit_start(self) -> None:
        """Open the store of the teacher's logits, and move the teacher to the device."""
        if self._open_store is not None:
            self.store = self._open_store(self.global_rank, self.trainer.world_size)
        self.on_validation_start()

    def on_validation_start(self) -> None:
        """Move the teacher to the device, as Lightning doesn't know it."""
        dtype = next(self.model.parameters()).dtype
        self.teacher.to(device=self.device, dtype=dtype)
        if self._reader is not None:
            self._reader.to(device=self.device, dtype=dtype)

    def teacher_outputs(self, images: Tensor) -> Outputs:
        """Compute the teacher's outputs on the very images that the student sees, or read its stored logits."""
        if self.store is None or not self.trainer.training:
            return self.teacher(images)
        # With a period, the views of earlier epochs repeat.
        period = batches_of(self.trainer).period
        epoch = self.current_epoch if period is None else self.current_epoch % period
        stored = self.store.read(epoch, self._batch_idx, images)
        if stored is not None:
            return Outputs(stored.to(images.device, non_blocking=True))
        return Outputs(self.store.write(epoch, self._batch_idx, images, self.teacher(images).logits))

    def student_outputs(self, images: Tensor, teacher: Outputs | None) -> Outputs:
        """Compute the student's logits, and if compared, features and gradients of the teacher's top-1 logit."""
        if self.objective.needs_gradients:
            images = images.detach().requires_grad_()
        logits, features = (self.model(images), {}) if self._reader is None else self._reader(images)
        if teacher is None or not self.objective.needs_gradients:
            return Outputs(logits, features)
        top = logits.gather(1, teacher.logits.argmax(dim=1, keepdim=True))
        (gradients,) = torch.autograd.grad(top.sum(), images, create_graph=True)
        return Outputs(logits, features, gradients)

    def compare_with_teacher(self, images: Tensor, logits: Tensor, batch_idx: int) -> None:
        """Measure the agreement: the fraction of images for which the student's top-1 class is the teacher's.

        With several labels an image, it is the fraction of all decisions on a class.

        The validation batches are the same in every epoch, so the teacher's classes are computed once.
        """
        if self.teacher.features_only:
            return
        if batch_idx not in self._teacher_decisions:
            self._teacher_decisions[batch_idx] = self.teacher.decisions(images)
        decisions = self._teacher_decisions[batch_idx].to(logits.device)
        equal = (decide(logits, multilabel=self.multilabel) == decisions).float()
        self.val_agreement.update(equal.flatten(1).mean(dim=1) if self.multilabel else equal)
        self.log("val/agreement", self.val_agreement, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        """Log the teacher's accuracy as a constant curve."""
        if self.teacher_acc is not None:
            self.log("teacher/acc", self.teacher_acc, sync_dist=True)


def _pair_features(name: str, loss: FeatureLoss, student: Survey, teacher: Survey) -> list[Pair]:
    """Pair the feature maps that a loss names, or the networks' stages from the last one on.

    Stages are counted from the end because networks differ in how early they begin to halve the size.
    """
    named = loss.nodes("student"), loss.nodes("teacher")
    try:
        ours, theirs = _find_nodes(named[0], loss, student), _find_nodes(named[1], loss, teacher)
    except UserError as error:
        raise UserError(f"--loss {name}: {error}") from None
    if not all(named):
        count, required = min(len(ours), len(theirs)), max(map(len, named))
        if count < required:
            raise UserError(f"--loss {name}: {required} nodes are given for one network, but the other has {count}")
        ours, theirs = ours[-count:], theirs[-count:]
    if len(ours) != len(theirs):
        raise UserError(
            f"--loss {name}: student_node and teacher_node must have the same number of nodes, not {len(ours)} "
            f"({', '.join(ours)}) and {len(theirs)} ({', '.join(theirs)})"
        )
    return [Pair(*pair, student.shapes[pair[0]], teacher.shapes[pair[1]]) for pair in zip(ours, theirs, strict=True)]


def _find_nodes(named: list[str], loss: FeatureLoss, survey: Survey) -> list[str]:
    if named:
        return [survey.find(node) for node in named]
    last = survey.last()
    return list(survey.stages) if loss.every_stage else [last]
