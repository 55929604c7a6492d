"""The objective: a weighted sum of losses, read from ``ce=0.1 kl=0.9``."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.schedules import Schedule
from kd.losses.terms import LOSSES, Loss, Outputs
from kd.registry import Call, check_hyperparameters, is_own_code, load_own_code, parse_choice, parse_value

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """One part of an objective.

    Args:
        name: What it is logged as.
        weight: Its weight in the sum, not negative, or the schedule of one.
        loss: The loss: ``(student logits, teacher logits, labels)`` to a scalar.
        needs_teacher: Whether it looks at the teacher's logits.
        needs_labels: Whether it looks at the labels.
        standardize: Whether it sees the logits of student and teacher standardised, see :func:`standardized`.
        scheduled: Hyperparameters of the loss that change over the epochs.
    """

    name: str
    weight: float | Schedule
    loss: LossFunction
    needs_teacher: bool = True
    needs_labels: bool = True
    standardize: bool = False
    scheduled: Mapping[str, Schedule] = field(default_factory=dict)

    def at(self, epoch: int, epochs: int) -> "Term":
        """Return the term as it is in an epoch (from 0) of a training of so many epochs."""
        weight = self.weight.at(epoch, epochs) if isinstance(self.weight, Schedule) else self.weight
        values = {name: schedule.at(epoch, epochs) for name, schedule in self.scheduled.items()}
        loss = replace(self.loss, **values) if values else self.loss  # type: ignore[type-var]  # a dataclass
        return replace(self, weight=weight, loss=loss, scheduled={})

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, unweighted: logits ``(B, C)`` twice and labels ``(B,)`` to a scalar."""
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        return self.loss(student, teacher, labels)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, computed in float32 whatever the precision of the networks.

    Args:
        terms: The losses with their weights.

    Example:
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

    def at(self, epoch: int, epochs: int) -> "Objective":
        """Return the objective as it is in an epoch (from 0) of a training of so many epochs.

        Example:
            >>> objective = build_objective("ce=1 'kl(temperature=linear(8, 2))=warmup(0.9, 3)'".replace("'", ""))
            >>> [(term.weight, term.loss) for term in objective.at(1, 3).terms][1]
            (0.6, SoftenedKL(temperature=5.0))
        """
        return Objective(tuple(term.at(epoch, epochs) for term in self.terms))

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the sum.

        Args:
            student: The student's outputs, logits ``(B, C)``.
            teacher: The teacher's, or ``None`` where no term needs them.
            labels: ``(B,)``, integers.

        Returns:
            The weighted total, a scalar with a gradient, and each term unweighted, by its name, without.

        Raises:
            ValueError: If a term needs a teacher and there is none, or a schedule has not been told the epoch.
        """
        if any(isinstance(term.weight, Schedule) or term.scheduled for term in self.terms):
            raise ValueError("this objective changes over the epochs: say which one it is by .at(epoch, epochs)")
        if teacher is None and self.needs_teacher:
            raise ValueError("this objective needs a teacher's outputs, and there are none")
        student_logits = student.logits.float()
        teacher_logits = student_logits.detach() if teacher is None else teacher.logits.detach().float()
        with torch.autocast(student_logits.device.type, enabled=False):
            values = {term.name: term(student_logits, teacher_logits, labels) for term in self.terms}
        weighted = [float(term.weight) * values[term.name] for term in self.terms]  # type: ignore[arg-type]
        total = torch.stack(weighted).sum()
        return total, {name: value.detach() for name, value in values.items()}


def standardized(logits: Tensor) -> Tensor:
    r"""Shift and scale the logits of each image to mean 0 and standard deviation 1.

    .. math:: \frac{z_{bc} - \bar z_b}{\mathrm{std}(z_b)}

    A loss on standardised logits does not change when the teacher's are scaled by a positive factor and shifted, so
    that a student need not reach the size of the teacher's logits.

    Args:
        logits: ``(B, C)``.

    Source: Sun et al. (2024), section 4, https://arxiv.org/abs/2403.01427
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    # The root of a sum with something in it, for the sake of the gradient where all logits are equal.
    return centred * (centred.square().sum(dim=1, keepdim=True) / (logits.shape[1] - 1) + 1e-14).rsqrt()


def build_objective(
    terms: str | Sequence[str] | Mapping[str, float], *, num_classes: int = 10, **defaults: float | None
) -> Objective:
    """Build an objective from its written form.

    Args:
        terms: ``"ce=0.1 kl(temperature=2)=0.9"``, a sequence of such, or a mapping from losses to weights. A loss
            without a weight has weight 1; a person's own is ``path/to/file.py:function``. Any that looks at the
            teacher takes ``standardize=True``. A weight or a hyperparameter may be a schedule, ``warmup(0.9, 20)``.
        num_classes: Number of classes C, with which a person's own loss is tried.
        defaults: Values for hyperparameters of that name (``temperature``, ``label_smoothing``), where a term takes
            them and has none of its own; ``None`` leaves the loss's default.

    Raises:
        UserError: If there is no term, a loss or a hyperparameter is unknown, a weight is negative or no number, two
            terms are the same, or a person's own loss fails its trial.

    Example:
        >>> [(term.name, term.weight) for term in build_objective({"ce": 0.1, "kl": 0.9}).terms]
        [('ce', 0.1), ('kl', 0.9)]
    """
    if isinstance(terms, Mapping):
        terms = [f"{loss}={weight}" for loss, weight in terms.items()]
    written = _split(terms if isinstance(terms, str) else " ".join(terms))
    if not written:
        raise UserError("--loss: an objective needs a term at least, such as ce=1")
    pairs = [_weigh(text) for text in written]
    losses = [loss for loss, _ in pairs]
    names = [_name(loss) for loss in losses]
    # Two of a kind (kl at two temperatures) go by their full spelling.
    names = [loss if names.count(name) > 1 else name for name, loss in zip(names, losses, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"--loss: {max(names, key=names.count)} stands there twice")
    try:
        return Objective(
            tuple(
                _build_term(name, loss, weight, num_classes=num_classes, defaults=defaults)
                for name, (loss, weight) in zip(names, pairs, strict=True)
            )
        )
    except UserError as error:
        raise UserError(f"--loss: {str(error).removeprefix('--loss ')}") from error.__cause__


def try_loss(function: LossFunction, *, name: str, num_classes: int = 10) -> None:
    """Try a person's own loss once on random tensors.

    Args:
        function: ``(student logits (8, C), teacher logits (8, C), labels (8,))`` to a scalar.
        name: Its name, for the messages.
        num_classes: Number of classes C.

    Raises:
        UserError: If it raises, returns no finite scalar, or gives the student no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, num_classes, generator=generator, requires_grad=True)
    teacher = torch.randn(8, num_classes, generator=generator)
    labels = torch.randint(num_classes, (8,), generator=generator)
    tried = f"--loss {name}: tried on random logits of shape (8, {num_classes}),"
    try:
        value = function(student, teacher, labels)
    except Exception as error:
        raise UserError(f"{tried} it raised {type(error).__name__}: {error}") from error
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"{tried} it returned {got}; a loss returns a scalar tensor, the mean over the batch")
    if not torch.isfinite(value):
        raise UserError(f"{tried} it returned {value.item()}; a loss is finite")
    gradient = torch.autograd.grad(value, student, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None or not gradient.any():
        raise UserError(f"{tried} it gave the student no gradient, so that nothing would be learnt from it")
    if not torch.isfinite(gradient).all():
        raise UserError(f"{tried} the gradient that it gave the student is not finite")


def _split(text: str) -> list[str]:
    """Split at white space outside of parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character.isspace() and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def _weigh(text: str) -> tuple[str, float | Schedule]:
    """Take a written term apart: at the first equals sign that stands in no parentheses."""
    depth, end = 0, len(text)
    for position, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "=" and depth == 0:
            end = position
            break
    loss, weight = text[:end], text[end + 1 :]
    if not loss or depth:
        raise UserError(f"--loss {text}: a term is written name=weight or 'name(key=value)=weight'")
    if end == len(text):
        return loss, 1.0
    try:
        value = parse_value(weight)
        number = value if isinstance(value, Call) else float(weight)
    except ValueError:
        raise UserError(f"--loss {text}: the weight of {loss} must be a number, and is {weight!r}") from None
    if isinstance(number, Call):
        schedule = Schedule.from_call(number)
        # The schedules go up or down, so that the ends tell.
        if min(schedule.at(0, 2), schedule.at(1, 2)) < 0:
            raise UserError(f"--loss {text}: the weight of {loss} must be 0 or more, all the time")
        return loss, schedule
    if not (math.isfinite(number) and number >= 0):
        raise UserError(f"--loss {text}: the weight of {loss} must be 0 or more, and is {weight}")
    return loss, number


def _name(loss: str) -> str:
    name, _ = parse_choice(loss)
    return name.rpartition(":")[2] if is_own_code(name) else name


def _build_term(
    name: str, loss: str, weight: float | Schedule, *, num_classes: int, defaults: Mapping[str, float | None]
) -> Term:
    choice, hyperparameters = parse_choice(loss)
    standardize = hyperparameters.pop("standardize", False)
    if not isinstance(standardize, bool):
        raise UserError(f"--loss {loss}: standardize is True or False, not {standardize!r}")
    calls = {key: value for key, value in hyperparameters.items() if isinstance(value, Call)}
    scheduled = {key: Schedule.from_call(call) for key, call in calls.items()}
    hyperparameters |= {key: schedule.at(0, 2) for key, schedule in scheduled.items()}
    if is_own_code(choice):
        if scheduled:
            raise UserError(f"--loss {loss}: of your own loss the weight alone may change over the epochs")
        function = load_own_code(choice)
        check_hyperparameters(function, hyperparameters, choice=loss)

        def own(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            value: Tensor = function(student, teacher, labels, **hyperparameters)
            return value

        try_loss(own, name=loss, num_classes=num_classes)
        return Term(name, weight, own, standardize=standardize)
    kind = LOSSES[choice]
    check_hyperparameters(kind, hyperparameters, choice=loss)
    parameters = inspect.signature(kind).parameters
    fitting = {key: value for key, value in defaults.items() if key in parameters and value is not None}
    try:
        built: Loss = kind(**fitting | hyperparameters)
        # The schedules go up or down, so that the ends tell whether the loss can take it.
        kind(**fitting | hyperparameters | {key: schedule.at(1, 2) for key, schedule in scheduled.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"--loss {loss}: {error}") from None
    if standardize and not built.needs_teacher:
        raise UserError(f"--loss {loss}: {choice} looks at no teacher; there is nothing to standardise")
    return Term(
        name,
        weight,
        built,
        needs_teacher=built.needs_teacher,
        needs_labels=built.needs_labels,
        standardize=standardize,
        scheduled=scheduled,
    )
