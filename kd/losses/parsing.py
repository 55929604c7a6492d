"""Parsing objectives from their written form: ``ce=0.1 'kl(temperature=2)=0.9' my_losses.py:cosine``."""

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.base import LOSSES
from kd.losses.objective import LossFunction, Objective, Term
from kd.losses.schedules import Schedule
from kd.registry import Call, check_hyperparameters, is_own_code, load_own_code, parse_choice, parse_value

_RESERVED = ("loss", "acc")


def build_objective(
    terms: str | Sequence[str] | Mapping[str, float],
    *,
    num_classes: int = 10,
    soft_labels: bool = False,
    **defaults: float | None,
) -> Objective:
    """Build an objective from its written form.

    Args:
        terms: Such as ``"ce=0.1 kl(temperature=2)=0.9"``, a sequence of such strings, or a mapping from losses to
            weights. The default weight is 1; a loss of your own is written ``path/to/file.py:function``. Every loss on
            the teacher's logits takes ``standardize=True``. A weight or a hyperparameter may be a schedule, such as
            ``warmup(0.9, 20)``.
        num_classes: Number of classes C, for the trial of a loss of your own.
        soft_labels: Whether the labels will be probabilities ``(B, C)``, which not all losses take.
        defaults: Values for hyperparameters of that name (``temperature``, ``label_smoothing``), used by all losses
            that have one and don't set it themselves; ``None`` leaves the loss's own default.

    Raises:
        UserError: If there is no term, a loss or a hyperparameter is unknown, a weight is negative or not a number, a
            term occurs twice, or a loss of your own fails its trial.

    Example:
        >>> [(term.name, term.weight) for term in build_objective({"ce": 0.1, "kl": 0.9}).terms]
        [('ce', 0.1), ('kl', 0.9)]
    """
    if isinstance(terms, Mapping):
        terms = [f"{loss}={weight}" for loss, weight in terms.items()]
    parsed = [_parse_term(text) for text in _split(terms if isinstance(terms, str) else " ".join(terms))]
    if not parsed:
        raise UserError("--loss: an objective needs at least one term, such as ce=1")
    names = [_name(loss) for loss, _ in parsed]
    # Two terms of one loss (kl at two temperatures) are named by their full spelling.
    names = [loss if names.count(name) > 1 else name for name, (loss, _) in zip(names, parsed, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"--loss: {max(names, key=names.count)} occurs twice")
    try:
        return Objective(
            tuple(
                _build_term(name, loss, weight, num_classes=num_classes, soft_labels=soft_labels, defaults=defaults)
                for name, (loss, weight) in zip(names, parsed, strict=True)
            )
        )
    except UserError as error:
        raise UserError(f"--loss: {str(error).removeprefix('--loss ')}") from error.__cause__


def try_loss(function: LossFunction, *, name: str, num_classes: int = 10, soft_labels: bool = False) -> bool:
    """Call a loss of the user's own once, on random tensors, and check its value and its gradient.

    Args:
        function: ``(student logits (8, C), teacher logits (8, C), labels (8,)) -> scalar``.
        name: Its name, for the messages.
        num_classes: Number of classes C.
        soft_labels: Whether the labels are probabilities, ``(8, C)``.

    Returns:
        Whether the loss depends on the labels: whether its value changes if all of them are -1.

    Raises:
        UserError: If it raises an exception, doesn't return a finite scalar, or gives the student no finite gradient.
    """
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, num_classes, generator=generator, requires_grad=True)
    teacher = torch.randn(8, num_classes, generator=generator)
    labels = torch.randint(num_classes, (8,), generator=generator)
    trial = f"--loss {name}: for random logits of shape (8, {num_classes}),"
    if soft_labels:
        labels = torch.softmax(torch.randn(8, num_classes, generator=generator), dim=1)
        trial = f"--loss {name}: for the soft labels of mixed images, of shape (8, {num_classes}),"
    try:
        value = function(student, teacher, labels)
    except Exception as error:
        raise UserError(f"{trial} it raised {type(error).__name__}: {error}") from error
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"{trial} it returned {got}; return a scalar tensor, the mean over the batch")
    if not torch.isfinite(value):
        raise UserError(f"{trial} it returned {value.item()}; a loss must be finite")
    gradient = torch.autograd.grad(value, student, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None or not gradient.any():
        raise UserError(f"{trial} its gradient for the student is zero, so nothing would be learned from it")
    if not torch.isfinite(gradient).all():
        raise UserError(f"{trial} its gradient for the student is not finite")
    try:
        return not torch.equal(function(student, teacher, torch.full_like(labels, -1)), value)
    except Exception:  # noqa: BLE001 (any failure on invalid labels shows that it depends on them)
        return True


def _depths(text: str) -> list[int]:
    """Return the depth of nested parentheses after each character."""
    return list(accumulate({"(": 1, ")": -1}.get(character, 0) for character in text))


def _split(text: str) -> list[str]:
    """Split at white space outside parentheses."""
    parts = [""]
    for character, depth in zip(text, _depths(text), strict=True):
        if character.isspace() and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def _parse_term(text: str) -> tuple[str, float | Schedule]:
    """Split a term at the first equals sign outside parentheses into the loss and its weight."""
    depths = _depths(text)
    end = next((index for index, depth in enumerate(depths) if text[index] == "=" and depth == 0), None)
    loss, weight = (text, None) if end is None else (text[:end], text[end + 1 :])
    if not loss or (weight is None and depths[-1]):
        raise UserError(f"--loss {text}: write a term as name=weight or 'name(key=value)=weight'")
    if weight is None:
        return loss, 1.0
    try:
        value = parse_value(weight)
        parsed = Schedule.from_call(value) if isinstance(value, Call) else float(weight)
    except UserError as error:
        raise UserError(f"--loss {text}: {error}") from None
    except ValueError:
        raise UserError(f"--loss {text}: the weight of {loss} must be a number, not {weight!r}") from None
    lowest = min(parsed.extremes) if isinstance(parsed, Schedule) else parsed
    if not (math.isfinite(lowest) and lowest >= 0):
        raise UserError(f"--loss {text}: the weight of {loss} must be 0 or more, not {weight}")
    return loss, parsed


def _name(loss: str) -> str:
    """Return the name of a loss without its hyperparameters; for the user's own code, the function's."""
    name, _ = parse_choice(loss)
    function = name.rpartition(":")[2]
    # The curves of the total loss and the accuracy have these names.
    return function if is_own_code(name) and function not in _RESERVED else name


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
        raise UserError(f"--loss {loss}: standardize must be True or False, not {standardize!r}")
    calls = {key: value for key, value in hyperparameters.items() if isinstance(value, Call)}
    scheduled = {key: Schedule.from_call(call) for key, call in calls.items()}
    if is_own_code(choice):
        if scheduled:
            raise UserError(f"--loss {loss}: only the weight of your own loss can follow a schedule")
        function = load_own_code(choice)
        check_hyperparameters(function, hyperparameters, choice=loss)

        def own(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            value: Tensor = function(student, teacher, labels, **hyperparameters)
            return value

        needs_labels = try_loss(own, name=loss, num_classes=num_classes, soft_labels=soft_labels)
        return Term(name, weight, own, needs_labels=needs_labels, standardize=standardize)
    kind = LOSSES[choice]
    constants = sorted(set(scheduled) & set(kind.constants))
    if constants:
        raise UserError(f"--loss {loss}: {constants[0]} can't follow a schedule; it is used once, at the start")
    check_hyperparameters(kind, hyperparameters, choice=loss)
    parameters = inspect.signature(kind).parameters
    values = {key: value for key, value in defaults.items() if key in parameters and value is not None}
    values |= hyperparameters
    try:
        first, _ = (
            kind(**values | {key: schedule.extremes[end] for key, schedule in scheduled.items()}) for end in (0, 1)
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--loss {loss}: {error}") from None
    built: Any = first
    if standardize and not (built.needs_teacher and callable(built)):
        raise UserError(f"--loss {loss}: {choice} doesn't depend on the teacher's logits; remove standardize")
    if soft_labels and built.needs_labels and not built.takes_soft_labels:
        raise UserError(f"--loss {loss}: {choice} needs integer labels; it can't be combined with mixup or CutMix")
    return Term(
        name,
        weight,
        built,
        needs_teacher=built.needs_teacher,
        needs_labels=built.needs_labels,
        standardize=standardize,
        scheduled=scheduled,
    )
