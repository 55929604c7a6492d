"""The objective: a weighted sum of losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.losses.derivatives import JacobianMatching
from kd.losses.features import FeatureLoss, Shape
from kd.losses.schedules import Schedule
from kd.losses.terms import Outputs

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """A map of the student, and the one of the teacher that it is compared with.

    Args:
        student: Node of the student's network.
        teacher: Node of the teacher's.
        student_shape: ``(C, H, W)``.
        teacher_shape: ``(C, H, W)``.
    """

    student: str
    teacher: str
    student_shape: Shape
    teacher_shape: Shape


@dataclass(frozen=True)
class Term:
    """One part of an objective.

    Args:
        name: What it is logged as.
        weight: Its weight in the sum, not negative, or the schedule of one.
        loss: The loss: ``(student logits, teacher logits, labels)`` to a scalar, or one on features or on gradients.
        needs_teacher: Whether it looks at the teacher.
        needs_labels: Whether it looks at the labels.
        standardize: Whether it sees the logits of student and teacher standardized, see :func:`standardized`.
        scheduled: Hyperparameters of the loss that change over the epochs.
        pairs: Of a loss on features, the maps that it compares.
        adapters: What is learned with the student to make them comparable, for each pair; ``None`` where nothing is.
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

    def at(self, epoch: int, epochs: int) -> "Term":
        """Return the term as it is in an epoch (from 0) of a training of so many epochs."""
        weight = self.weight.at(epoch, epochs) if isinstance(self.weight, Schedule) else self.weight
        values = {name: schedule.at(epoch, epochs) for name, schedule in self.scheduled.items()}
        loss = replace(self.loss, **values) if values else self.loss  # type: ignore[type-var]  # a dataclass
        return replace(self, weight=weight, loss=loss, scheduled={})

    @property
    def uses_logits(self) -> bool:
        """Whether it looks at the student's logits."""
        return not isinstance(self.loss, FeatureLoss | JacobianMatching)

    def bind(self, pairs: Sequence[Pair]) -> "Term":
        """Return the term with the maps that it compares, and with new adapters for them.

        Raises:
            UserError: If such maps can't be compared.
        """
        adapters: list[nn.Module | None] = []
        if not isinstance(self.loss, FeatureLoss):
            raise TypeError(f"{self.name} does not compare features")
        for pair in pairs:
            try:
                adapters.append(self.loss.build_adapter(pair.student_shape, pair.teacher_shape))
            except ValueError as error:
                where = f"the student's {pair.student} and the teacher's {pair.teacher}"
                raise UserError(f"--loss {self.name}: {where} can't be compared: {error}") from None
        return replace(self, pairs=tuple(pairs), adapters=tuple(adapters))

    def __call__(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the loss, unweighted, a scalar."""
        if isinstance(self.loss, FeatureLoss):
            return self._compare(self.loss, student, teacher)
        if isinstance(self.loss, JacobianMatching):
            if student.gradients is None or teacher.gradients is None:
                raise ValueError(f"{self.name} needs the gradients to the images, and there are none")
            return self.loss.compare(student.gradients.float(), teacher.gradients.float())
        z, v = student.logits, teacher.logits
        return self.loss(*((standardized(z), standardized(v)) if self.standardize else (z, v)), labels)

    def _compare(self, loss: FeatureLoss, student: Outputs, teacher: Outputs) -> Tensor:
        if not self.pairs:
            raise ValueError(f"{self.name} compares features: say which ones by .bind(pairs)")
        values = [
            loss.compare(
                student.features[pair.student].float(), teacher.features[pair.teacher].detach().float(), adapter
            )
            for pair, adapter in zip(self.pairs, self.adapters, strict=True)
        ]
        return torch.stack(values).sum()


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
        """Whether any term looks at the teacher."""
        return any(term.needs_teacher and (isinstance(term.weight, Schedule) or term.weight > 0) for term in self.terms)

    @property
    def needs_labels(self) -> bool:
        """Whether any term looks at the labels."""
        return any(term.needs_labels for term in self.terms)

    @property
    def needs_gradients(self) -> bool:
        """Whether any term looks at the gradients to the images."""
        return any(isinstance(term.loss, JacobianMatching) for term in self.terms)

    @property
    def feature_terms(self) -> tuple[Term, ...]:
        """The terms that compare features."""
        return tuple(term for term in self.terms if isinstance(term.loss, FeatureLoss))

    @property
    def trains_head(self) -> bool:
        """Whether any term looks at the student's logits; else its last layer learns nothing."""
        return any(term.uses_logits for term in self.terms)

    def bind(self, pairs: Mapping[str, Sequence[Pair]]) -> "Objective":
        """Return the objective with the maps that its terms on features compare, and with new adapters for them.

        Args:
            pairs: By the name of the term.

        Raises:
            UserError: If such maps can't be compared.
        """
        return Objective(tuple(term.bind(pairs[term.name]) if term.name in pairs else term for term in self.terms))

    def at(self, epoch: int, epochs: int) -> "Objective":
        """Return the objective as it is in an epoch (from 0) of a training of so many epochs.

        Example:
            >>> from kd.losses import build_objective
            >>> objective = build_objective("ce=1 'kl(temperature=linear(8, 2))=warmup(0.9, 3)'".replace("'", ""))
            >>> [(term.weight, term.loss) for term in objective.at(1, 3).terms][1]
            (0.6, SoftenedKL(temperature=5.0))
        """
        return Objective(tuple(term.at(epoch, epochs) for term in self.terms))

    def __call__(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, *, labeled: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the sum.

        Args:
            student: The student's outputs, logits ``(B, C)``.
            teacher: The teacher's, or ``None`` where no term needs them.
            labels: ``(B,)``, integers; or ``(B, C)``, probabilities, if all terms that look at them take these.
            labeled: ``(B,)``, true where the image has a label; the terms that look at labels are given these images
                alone, and are their mean. ``None``: all have one.

        Returns:
            The weighted total, a scalar with a gradient, and each term unweighted, by its name, without; a term that
            looks at labels is missing where no image has one.

        Raises:
            ValueError: If a term needs a teacher and there is none, or a schedule has not been told the epoch.
        """
        if any(isinstance(term.weight, Schedule) or term.scheduled for term in self.terms):
            raise ValueError("this objective changes over the epochs: say which one it is by .at(epoch, epochs)")
        if teacher is None and self.needs_teacher:
            raise ValueError("this objective needs a teacher's outputs, and there are none")
        student_logits = student.logits.float()
        student = replace(student, logits=student_logits)
        if teacher is None:
            teacher = Outputs(student_logits)
        teacher = replace(teacher, logits=teacher.logits.detach().float())
        rows = None if labeled is None else labeled.nonzero().squeeze(1)
        values: dict[str, Tensor] = {}
        with torch.autocast(student_logits.device.type, enabled=False):
            for term in self.terms:
                if rows is None or not term.needs_labels:
                    values[term.name] = term(student, teacher, labels)
                elif len(rows):
                    seen = Outputs(student.logits[rows]), Outputs(teacher.logits[rows])
                    values[term.name] = term(*seen, labels[rows])
            # Without a term that looks at the logits, DDP would wait for a gradient of the last layer.
            looked_at = any(term.uses_logits for term in self.terms if term.name in values)
            weighted = [] if looked_at else [student_logits.sum() * 0.0]
        weighted += [float(term.weight) * values[term.name] for term in self.terms if term.name in values]  # type: ignore[arg-type]
        return torch.stack(weighted).sum(), {name: value.detach() for name, value in values.items()}


def standardized(logits: Tensor) -> Tensor:
    r"""Shift and scale the logits of each image to mean 0 and standard deviation 1.

    .. math:: \frac{z_{bc} - \bar z_b}{\mathrm{std}(z_b)}

    A loss on standardized logits does not change when the teacher's are scaled by a positive factor and shifted, so
    that a student need not reach the size of the teacher's logits.

    Args:
        logits: ``(B, C)``.

    Source: Sun et al. (2024), section 4, https://arxiv.org/abs/2403.01427
    """
    centerd = logits - logits.mean(dim=1, keepdim=True)
    # The root of a sum with something in it, for the sake of the gradient where all logits are equal.
    return centerd * (centerd.square().sum(dim=1, keepdim=True) / (logits.shape[1] - 1) + 1e-14).rsqrt()
