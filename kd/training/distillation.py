"""The module that distills: the same training step, with a teacher's answers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from kd.data import Batches, Mixing
from kd.losses import Objective, Outputs
from kd.models import Classifier, FeatureReader, survey
from kd.randomness import seeded
from kd.teachers import FrozenTeacher, LogitStore
from kd.training.features import choose_pairs
from kd.training.modules import ClassifierModule
from kd.training.optimization import Recipe


class DistillationModule(ClassifierModule):
    """A student that learns from a teacher.

    Its checkpoint is that of a plain classifier: the teacher is not in it.

    Args:
        teacher: Who answers.
        student: Who learns.
        objective: What the student minimizes.
        recipe: How.
        seed: What the randomness of each step hangs on.
        teacher_acc: The teacher's accuracy on the validation images, to be drawn beside the student's.
        teacher_decisions: The classes that the teacher decides for, ``(N,)`` in the order of the validation images,
            where that is known; ``None``: it is asked at the first validation.
        mixing: Mixes the images of a batch; the teacher sees the mixture too.
        ema: Decay of an average of the student's weights, as of :class:`ClassifierModule`.
        has_unlabeled: Whether some of the images have no label.
        open_store: Opens the store where the teacher's logits are read, and written where they are not there, for
            ``rank`` of ``world_size`` processes; ``None``: the teacher is always asked. Nothing is stored where the
            images are mixed, or features or gradients are compared.

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
        open_store: Callable[[int, int], LogitStore | None] | None = None,
    ) -> None:
        objective, ours, theirs = _bound(objective, student=student, teacher=teacher, seed=seed)
        super().__init__(
            student,
            objective=objective,
            recipe=recipe,
            seed=seed,
            mixing=mixing,
            ema=ema,
            has_unlabeled=has_unlabeled,
        )
        self.adapters = nn.ModuleList(
            adapter for term in objective.feature_terms for adapter in term.adapters if adapter is not None
        )
        self._reader = FeatureReader(student, ours) if ours else None
        self.teacher = teacher.giving(nodes=theirs, gradients=objective.needs_gradients)
        can_be_stored = mixing is None and not (theirs or objective.needs_gradients)
        self._open_store = open_store if can_be_stored else None
        self.store: LogitStore | None = None
        self.teacher_acc = teacher_acc
        self.val_agreement = MeanMetric()
        self._known_decisions = teacher_decisions
        self._teacher_decisions: dict[int, Tensor] = {}

    def setup(self, stage: str) -> None:  # noqa: ARG002 (Lightning's signature)
        """Share out what is known of the teacher's decisions; those of an earlier run were about other images."""
        self._teacher_decisions.clear()
        data = getattr(self.trainer, "datamodule", None)
        if self._known_decisions is not None and isinstance(data, Batches):
            mine = self._known_decisions[data.validation_indices(self.global_rank, self.trainer.world_size)]
            self._teacher_decisions.update(enumerate(torch.split(mine, data.batch_size)))

    def on_fit_start(self) -> None:
        """Move the teacher to where the student is, which Lightning does not see, and open the store of its logits."""
        if self._open_store is not None:
            self.store = self._open_store(self.global_rank, self.trainer.world_size)
        self._move_teacher()

    def _move_teacher(self) -> None:
        dtype = next(self.model.parameters()).dtype
        self.teacher.to(device=self.device, dtype=dtype)
        if self._reader is not None:
            self._reader.to(device=self.device, dtype=dtype)

    def on_validation_start(self) -> None:
        """Move the teacher for a validation without a fit, too."""
        self._move_teacher()

    def teacher_outputs(self, images: Tensor) -> Outputs:
        """Ask the teacher about the very images that the student sees, or read what it said of them."""
        if self.store is None or not self.trainer.training:
            return self.teacher(images)
        epoch, batch = self._epoch_of_views(), self._batch_idx
        stored = self.store.read(epoch, batch, images)
        if stored is not None:
            return Outputs(stored.to(images.device, non_blocking=True))
        answer = self.teacher(images)
        return Outputs(self.store.write(epoch, batch, images, answer.logits))

    def _epoch_of_views(self) -> int:
        """Return which epoch's views these are: with a period they come again."""
        period = getattr(getattr(self.trainer, "datamodule", None), "period", None)
        return self.current_epoch if period is None else self.current_epoch % period

    def student_outputs(self, images: Tensor, teacher: Outputs | None) -> Outputs:
        """Read the features that are compared, and the gradients of the logits that the teacher puts first."""
        if self.objective.needs_gradients:
            images = images.detach().requires_grad_()
        logits, features = (self.model(images), {}) if self._reader is None else self._reader(images)
        if teacher is None or not self.objective.needs_gradients:
            return Outputs(logits, features)
        top = logits.gather(1, teacher.logits.argmax(dim=1, keepdim=True))
        (gradients,) = torch.autograd.grad(top.sum(), images, create_graph=True)
        return Outputs(logits, features, gradients)

    def compare_with_teacher(self, images: Tensor, logits: Tensor, batch_idx: int) -> None:
        """Measure the share of images on which the student's decision is the teacher's.

        The validation batches are the same in every epoch, so that the teacher is asked in the first one only.
        """
        if batch_idx not in self._teacher_decisions:
            self._teacher_decisions[batch_idx] = self.teacher.decisions(images)
        decisions = self._teacher_decisions[batch_idx].to(logits.device)
        self.val_agreement.update((logits.argmax(dim=1) == decisions).float())
        self.log("val/agreement", self.val_agreement, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        """Draw the teacher's accuracy as a line beside the student's."""
        if self.teacher_acc is not None:
            self.log("teacher/acc", self.teacher_acc, sync_dist=True)


def _bound(
    objective: Objective, *, student: Classifier, teacher: FrozenTeacher, seed: int
) -> tuple[Objective, list[str], list[str]]:
    """Choose what the objective's terms on features compare; return it with the student's and the teacher's nodes."""
    if not objective.feature_terms:
        return objective, [], []
    chosen = choose_pairs(objective, student=survey(student), teacher=teacher.survey())
    pairs = [pair for some in chosen.values() for pair in some]
    # The adapters of one seed begin with the same weights, whatever else was drawn before.
    with seeded(seed, "adapters"):
        objective = objective.bind(chosen)
    ours, theirs = dict.fromkeys(pair.student for pair in pairs), dict.fromkeys(pair.teacher for pair in pairs)
    return objective, list(ours), list(theirs)
