"""Reading an objective as it is written: ``ce=0.1 'kl(temperature=2)=0.9' my_losses.py:cosine``."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.objective import LossFunction, Objective, Term
from kd.losses.schedules import Schedule
from kd.losses.terms import LOSSES
from kd.registry import Call, check_hyperparameters, is_own_code, load_own_code, parse_choice, parse_value


def build_objective(
    terms: str | Sequence[str] | Mapping[str, float],
    *,
    num_classes: int = 10,
    soft_labels: bool = False,
    **defaults: float | None,
) -> Objective:
    """Build an objective from its written form.

    Args:
        terms: ``"ce=0.1 kl(temperature=2)=0.9"``, a sequence of such, or a mapping from losses to weights. A loss
            without a weight has weight 1; a person's own is ``path/to/file.py:function``. Any that looks at the
            teacher takes ``standardize=True``. A weight or a hyperparameter may be a schedule, ``warmup(0.9, 20)``.
        num_classes: Number of classes C, with which a person's own loss is tried.
        soft_labels: Whether the labels will be probabilities ``(B, C)``; a term that can't take these is refused.
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
                _build_term(name, loss, weight, num_classes=num_classes, soft_labels=soft_labels, defaults=defaults)
                for name, (loss, weight) in zip(names, pairs, strict=True)
            )
        )
    except UserError as error:
        raise UserError(f"--loss: {str(error).removeprefix('--loss ')}") from error.__cause__


def try_loss(function: LossFunction, *, name: str, num_classes: int = 10, soft_labels: bool = False) -> bool:
    """Try a person's own loss once on random tensors.

    Args:
        function: ``(student logits (8, C), teacher logits (8, C), labels (8,))`` to a scalar.
        name: Its name, for the messages.
        num_classes: Number of classes C.
        soft_labels: Whether the labels are probabilities, ``(8, C)``.

    Returns:
        Whether it looks at the labels: whether it comes to something else without them (all of them -1).

    Raises:
        UserError: If it raises, returns no finite scalar, or gives the student no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, num_classes, generator=generator, requires_grad=True)
    teacher = torch.randn(8, num_classes, generator=generator)
    labels = torch.randint(num_classes, (8,), generator=generator)
    tried = f"--loss {name}: tried on random logits of shape (8, {num_classes}),"
    if soft_labels:
        labels = torch.softmax(torch.randn(8, num_classes, generator=generator), dim=1)
        tried = f"--loss {name}: tried with the soft labels of mixed images, of shape (8, {num_classes}),"
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
        raise UserError(f"{tried} it gave the student no gradient, so that nothing would be learned from it")
    if not torch.isfinite(gradient).all():
        raise UserError(f"{tried} the gradient that it gave the student is not finite")
    try:
        return not torch.equal(function(student, teacher, torch.full_like(labels, -1)), value)
    except Exception:  # noqa: BLE001 (whatever it does with labels that are none, it looked at them)
        return True


_TAKEN = ("loss", "acc")


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
    own = name.rpartition(":")[2]
    # What the curves of the total and of the accuracy are called is taken.
    return own if is_own_code(name) and own not in _TAKEN else name


def _build_term(
    name: str,
    loss: str,
    weight: float | Schedule,
    *,
    num_classes: int,
    soft_labels: bool,
    defaults: Mapping[str, float | None],
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

        needs_labels = try_loss(own, name=loss, num_classes=num_classes, soft_labels=soft_labels)
        return Term(name, weight, own, needs_labels=needs_labels, standardize=standardize)
    kind = LOSSES[choice]
    fixed = sorted(set(scheduled) & set(getattr(kind, "fixed", ())))
    if fixed:
        raise UserError(f"--loss {loss}: {fixed[0]} can't change over the epochs; it is used once, at the beginning")
    check_hyperparameters(kind, hyperparameters, choice=loss)
    parameters = inspect.signature(kind).parameters
    fitting = {key: value for key, value in defaults.items() if key in parameters and value is not None}
    try:
        built: Any = kind(**fitting | hyperparameters)
        # The schedules go up or down, so that the ends tell whether the loss can take it.
        kind(**fitting | hyperparameters | {key: schedule.at(1, 2) for key, schedule in scheduled.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"--loss {loss}: {error}") from None
    if standardize and not (built.needs_teacher and callable(built)):
        raise UserError(f"--loss {loss}: {choice} looks at no teacher's logits; there is nothing to standardize")
    if soft_labels and built.needs_labels and not getattr(built, "takes_soft_labels", False):
        raise UserError(f"--loss {loss}: {choice} needs one label an image; it can't take those of mixed images")
    return Term(
        name,
        weight,
        built,
        needs_teacher=built.needs_teacher,
        needs_labels=built.needs_labels,
        standardize=standardize,
        scheduled=scheduled,
    )
