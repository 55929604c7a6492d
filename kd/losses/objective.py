"""The training objective: a weighted sum of losses."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.losses.base import Outputs, unit_vectors
from kd.losses.derivatives import JacobianMatching
from kd.losses.features import FeatureLoss, Shape
from kd.losses.schedules import Schedule

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """Two feature maps to compare: their nodes, and their shapes ``(C, H, W)``."""

    student: str
    teacher: str
    student_shape: Shape
    teacher_shape: Shape


@dataclass(frozen=True)
class Term:
    """One term of an objective.

    Args:
        name: The name under which it is logged.
        weight: At least 0, or a schedule.
        loss: A function ``(student logits, teacher logits, labels) -> scalar``, or a loss on features or gradients.
        needs_teacher: Whether the loss depends on the teacher.
        needs_labels: Whether the loss depends on the labels.
        standardize: Whether logits are standardized first, see `standardized`.
        scheduled: Schedules of hyperparameters, by name.
        pairs: The pairs of feature maps to compare.
        adapters: For each pair, the module trained along with the student to make it comparable, if one is needed.
    """

    name: str
    weight: float | Schedule
    loss: LossFunction | FeatureLoss | JacobianMatching
    needs_teacher: bool = True
    needs_labels: bool = True
    standardize: bool = False
    scheduled: Mapping[str, Schedule] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    adapters: tuple[nn.Module | None, ...] = ()

    @property
    def uses_logits(self) -> bool:
        """Whether the loss depends on the student's logits."""
        return not isinstance(self.loss, FeatureLoss | JacobianMatching)

    def at(self, epoch: int, epochs: int) -> "Term":
        """Return the term in ``epoch`` (from 0) of a training of ``epochs`` epochs."""
        weight = self.weight.at(epoch, epochs) if isinstance(self.weight, Schedule) else self.weight
        values = {name: schedule.at(epoch, epochs) for name, schedule in self.scheduled.items()}
        loss = replace(self.loss, **values) if values else self.loss  # type: ignore[type-var]  # a dataclass
        return replace(self, weight=weight, loss=loss, scheduled={})

    def bind(self, pairs: Sequence[Pair]) -> "Term":
        """Return the term with the feature maps to compare, and new adapters for them."""
        if not isinstance(self.loss, FeatureLoss):
            raise TypeError(f"{self.name} does not compare features")
        adapters: list[nn.Module | None] = []
        for pair in pairs:
            try:
                adapters.append(self.loss.build_adapter(pair.student_shape, pair.teacher_shape))
            except ValueError as error:
                maps = f"the student's {pair.student} and the teacher's {pair.teacher}"
                raise UserError(f"--loss {self.name}: {maps} can't be compared: {error}") from None
        return replace(self, pairs=tuple(pairs), adapters=tuple(adapters))

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all adapters."""
        return [weight for adapter in self.adapters if adapter is not None for weight in adapter.parameters()]

    def __call__(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the unweighted loss, a scalar."""
        if isinstance(self.loss, FeatureLoss):
            if not self.pairs:
                raise ValueError(f"{self.name} compares features: choose them by .bind(pairs)")
            losses = []
            for pair, adapter in zip(self.pairs, self.adapters, strict=True):
                f, g = student.features[pair.student], teacher.features[pair.teacher]
                losses.append(self.loss.compare(f.float(), g.detach().float(), adapter))
            return torch.stack(losses).sum()
        if isinstance(self.loss, JacobianMatching):
            if student.gradients is None or teacher.gradients is None:
                raise ValueError(f"{self.name} needs the gradients with respect to the images")
            return self.loss.compare(student.gradients.float(), teacher.gradients.float())
        z, v = student.logits, teacher.logits
        return self.loss(*((standardized(z, floor=0.1), standardized(v)) if self.standardize else (z, v)), labels)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, computed in float32 whatever the precision of the networks.

    Args:
        terms: The losses with their weights.

    Example:
        >>> from kd.losses import build_objective
        >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> total, terms = build_objective("ce=0.5 mse=2")(Outputs(logits), Outputs(logits), labels)
        >>> {name: round(float(value), 3) for name, value in terms.items()}, round(float(total), 3)
        ({'ce': 0.127, 'mse': 0.0}, 0.063)
    """

    terms: tuple[Term, ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term depends on the teacher."""
        return any(term.needs_teacher for term in self.terms)

    @property
    def needs_labels(self) -> bool:
        """Whether any term depends on the labels."""
        return any(term.needs_labels for term in self.terms)

    @property
    def needs_gradients(self) -> bool:
        """Whether any term compares gradients with respect to the images."""
        return any(isinstance(term.loss, JacobianMatching) for term in self.terms)

    @property
    def feature_terms(self) -> tuple[Term, ...]:
        """The terms that compare features."""
        return tuple(term for term in self.terms if isinstance(term.loss, FeatureLoss))

    @property
    def reuses_head(self) -> bool:
        """Whether the student ends in the teacher's classifier layer."""
        return any(isinstance(term.loss, FeatureLoss) and term.loss.reuses_head for term in self.terms)

    @property
    def trains_head(self) -> bool:
        """Whether the student's last layer is trained, or the teacher's; otherwise it gets no gradient."""
        return self.reuses_head or any(term.uses_logits for term in self.terms)

    @property
    def terms_on_predictions(self) -> tuple[Term, ...]:
        """The terms that depend on the teacher's logits or on their gradients."""
        return tuple(term for term in self.terms if term.needs_teacher and not isinstance(term.loss, FeatureLoss))

    @property
    def is_scheduled(self) -> bool:
        """Whether a weight or a hyperparameter follows a schedule over the epochs."""
        return any(isinstance(term.weight, Schedule) or term.scheduled for term in self.terms)

    def bind(self, pairs: Mapping[str, Sequence[Pair]]) -> "Objective":
        """Return the objective with the pairs of feature maps to compare, by name of the term, and new adapters.

        Raises:
            UserError: If a loss is not defined for its maps.
        """
        return Objective(tuple(term.bind(pairs[term.name]) if term.name in pairs else term for term in self.terms))

    def at(self, epoch: int, epochs: int) -> "Objective":
        """Return the objective in ``epoch`` (from 0) of a training of ``epochs`` epochs.

        Example:
            >>> from kd.losses import build_objective
            >>> objective = build_objective("ce=1 kl(temperature=linear(8, 2))=warmup(0.9, 3)")
            >>> [(term.weight, term.loss) for term in objective.at(1, 3).terms][1]
            (0.6, SoftenedKL(temperature=5.0))
        """
        return Objective(tuple(term.at(epoch, epochs) for term in self.terms))

    def __call__(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, *, labeled: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the objective of a batch.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs; ``None`` if no term needs them.
            labels: ``(B,)``, integers, or ``(B, C)``, probabilities, if all terms that need labels take them.
            labeled: ``(B,)``, Boolean: the images with a label, to which terms that need labels are restricted.

        Returns:
            The weighted total, a scalar with a gradient, and the unweighted terms by name, without; terms that need
            labels are missing if no image has one.

        Raises:
            ValueError: If a term needs a teacher and there is none, or the objective has schedules, see `at`.
        """
        if self.is_scheduled:
            raise ValueError("this objective has schedules: choose the epoch by .at(epoch, epochs)")
        if teacher is None and self.needs_teacher:
            raise ValueError("this objective needs a teacher's outputs")
        student = replace(student, logits=student.logits.float())
        teacher = student if teacher is None else replace(teacher, logits=teacher.logits.float())
        teacher = replace(teacher, logits=teacher.logits.detach())
        rows = None if labeled is None else labeled.nonzero().squeeze(1)
        values: dict[str, Tensor] = {}
        with torch.autocast(student.logits.device.type, enabled=False):
            for term in self.terms:
                # A term that a schedule has at weight 0 is logged only: 0 times an infinite gradient would be NaN.
                with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight != 0):
                    if rows is None or not term.needs_labels:
                        values[term.name] = term(student, teacher, labels)
                    elif len(rows):
                        chosen = Outputs(student.logits[rows]), Outputs(teacher.logits[rows])
                        values[term.name] = term(*chosen, labels[rows])
            active = [term for term in self.terms if term.weight != 0 and term.name in values]
            weighted = [float(term.weight) * values[term.name] for term in active]  # type: ignore[arg-type]
            # DDP would wait for gradients of the last layer and of adapters that no active term depends on.
            idle = [] if any(term.uses_logits for term in active) else [student.logits]
            idle += [weight for term in self.terms if term not in active for weight in term.adapter_parameters()]
            weighted += [tensor.sum() * 0.0 for tensor in idle]
        return torch.stack(weighted).sum(), {name: value.detach() for name, value in values.items()}


def standardized(logits: Tensor, *, floor: float = 1e-6) -> Tensor:
    r"""Standardize the logits of each image to mean 0 and standard deviation 1.

    $$ \frac{z_{bc} - \bar z_b}{\max(\mathrm{std}(z_b), \epsilon)} $$

    A loss on standardized logits is invariant to the scale and shift of the teacher's, so that a small student need not
    reach their magnitude.

    Args:
        logits: ``(B, C)``.
        floor: $\epsilon > 0$, which bounds the gradient where all logits are equal, as with a zero-initialized head.

    Source: Sun et al. (2024), section 4, https://arxiv.org/abs/2403.01427
    """
    norm = math.sqrt(logits.shape[1] - 1)
    return norm * unit_vectors(logits - logits.mean(dim=1, keepdim=True), floor=floor * norm)
