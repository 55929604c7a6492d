"""Parsing objectives from their written form: ``ce=0.1 'kl(temperature=2)=0.9' my_losses.py:cosine``."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.base import LOSSES, BaseLoss
from kd.losses.objective import LossFunction, Objective, Term
from kd.losses.schedules import Schedule
from kd.registry import Call, check_hyperparameters, is_own_code, load_own_code, parse_choice, parse_value

_RESERVED = ("loss", "acc")
_BINARY = 2
SINGLE, SOFT, MULTILABEL = "one label an image", "class probabilities", "several labels an image"
"""Kinds of labels."""


def build_objective(
    terms: str | Sequence[str] | Mapping[str, float],
    *,
    num_classes: int = 10,
    soft_labels: bool = False,
    multilabel: bool = False,
    **defaults: float | Sequence[float] | None,
) -> Objective:
    """Build an objective from its written form.

    Args:
        terms: Such as ``"ce=0.1 kl(temperature=2)=0.9"``, a sequence of such strings, or a mapping from losses to
            weights. The default weight is 1, and 0 removes the term; a loss of your own is written
            ``path/to/file.py:function``. Every loss on the teacher's logits takes ``standardize=True``. A weight or a
            hyperparameter may be a schedule, such as ``warmup(0.9, 20)``.
        num_classes: Number of classes C, for the trial of a loss of your own.
        soft_labels: Whether the labels will be probabilities ``(B, C)``, which not all losses take.
        multilabel: Whether an image may have several labels, ``(B, C)`` of 0 and 1, for which not all losses are
            defined.
        defaults: Values for hyperparameters of that name (``temperature``, ``label_smoothing``, ``class_weights``),
            used by all losses that have one and don't set it themselves; ``None`` leaves the loss's own default.

    Raises:
        UserError: If a loss, a hyperparameter or a weight is invalid, or a term occurs twice.

    Example:
        >>> [(term.name, term.weight) for term in build_objective({"ce": 0.1, "kl": 0.9}).terms]
        [('ce', 0.1), ('kl', 0.9)]
    """
    if isinstance(terms, Mapping):
        terms = [f"{loss}={weight}" for loss, weight in terms.items()]
    written = _split(terms if isinstance(terms, str) else " ".join(terms), str.isspace)
    parsed = [_parse_term(text) for text in written if text]
    if not parsed:
        raise UserError("--loss: an objective needs at least one term, such as ce=1")
    names = [_name(loss) for loss, _ in parsed]
    # Two terms of one loss (kl at two temperatures) are named by their full spelling.
    names = [loss if names.count(name) > 1 else name for name, (loss, _) in zip(names, parsed, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"--loss: {max(names, key=names.count)} occurs twice")
    kind = MULTILABEL if multilabel else SOFT if soft_labels else SINGLE
    build = partial(_build_term, num_classes=num_classes, kind=kind, defaults=defaults)
    try:
        built = [build(name, loss, weight) for name, (loss, weight) in zip(names, parsed, strict=True)]
    except UserError as error:
        raise UserError(f"--loss: {error}") from error.__cause__
    if not (used := tuple(term for term in built if term.weight != 0)):
        raise UserError("--loss: all weights are 0; give one term a weight above 0")
    return Objective(used)


def _try_loss(function: LossFunction, loss: str, *, num_classes: int, kind: str) -> bool:
    """Check the user's own loss and its gradient on random tensors; return whether it depends on the labels."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, num_classes, generator=generator, requires_grad=True)
    teacher = torch.randn(8, num_classes, generator=generator)
    labels = torch.randint(num_classes, (8,), generator=generator)
    trial = f"{loss}: for random logits of shape (8, {num_classes}),"
    if kind == MULTILABEL:
        labels = (torch.rand(8, num_classes, generator=generator) > 0.5).float()  # noqa: PLR2004
        trial = f"{loss}: for several labels an image, of shape (8, {num_classes}),"
    elif kind == SOFT:
        labels = torch.softmax(torch.randn(8, num_classes, generator=generator), dim=1)
        trial = f"{loss}: for the soft labels of mixed images, of shape (8, {num_classes}),"
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


def _split(text: str, is_separator: Callable[[str], bool]) -> list[str]:
    """Split at separators outside parentheses."""
    depths = accumulate({"(": 1, ")": -1}.get(character, 0) for character in text)
    ends = [index for index, depth in enumerate(depths) if depth <= 0 and is_separator(text[index])]
    return [text[start + 1 : end] for start, end in pairwise([-1, *ends, len(text)])]


def _parse_term(text: str) -> tuple[str, float | Schedule]:
    """Split a term at the first equals sign outside parentheses into the loss and its weight."""
    loss = _split(text, "=".__eq__)[0]
    if not loss or loss.count("(") != loss.count(")"):
        raise UserError(f"--loss {text}: write a term as name=weight or 'name(key=value)=weight'")
    if loss == text:
        return loss, 1.0
    weight = text[len(loss) + 1 :]
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


def _check_binary(loss: str, *, standardize: bool, gamma: object) -> None:
    """Refuse losses whose gradient is zero for two classes."""
    if standardize:
        raise UserError(f"{loss}: two standardized logits are always 0.71 and -0.71; remove standardize")
    if loss.startswith("dist(") and gamma == 0:
        raise UserError(f"{loss}: the correlation of two probabilities is always 1 or -1; set gamma above 0")


def _check_kind(loss: type[BaseLoss], name: str, kind: str) -> None:
    """Refuse a loss that isn't defined for such labels."""
    if kind == MULTILABEL and not loss.is_multilabel:
        raise UserError(f"{name} needs one label an image; with several, use bce, binary_kl, mse or losses on features")
    if kind != MULTILABEL and not loss.is_single_label:
        raise UserError(f"{name} is for several labels an image (--multilabel)")
    if kind == SOFT and loss.needs_labels and not loss.takes_soft_labels:
        raise UserError(f"{name} needs integer labels; it can't be combined with mixup or CutMix")


def _build_term(
    name: str,
    loss: str,
    weight: float | Schedule,
    *,
    num_classes: int,
    kind: str,
    defaults: Mapping[str, float | Sequence[float] | None],
) -> Term:
    choice, hyperparameters = parse_choice(loss)
    standardize = hyperparameters.pop("standardize", False)
    if not isinstance(standardize, bool):
        raise UserError(f"{loss}: standardize must be True or False, not {standardize!r}")
    if num_classes == _BINARY:
        _check_binary(loss, standardize=standardize, gamma=hyperparameters.get("gamma"))
    scheduled = {key: Schedule.from_call(value) for key, value in hyperparameters.items() if isinstance(value, Call)}
    if is_own_code(choice):
        if scheduled:
            raise UserError(f"{loss}: only the weight of your own loss can follow a schedule")
        function = load_own_code(choice)
        check_hyperparameters(function, hyperparameters, choice=loss)
        own = partial(function, **hyperparameters)
        needs_labels = _try_loss(own, loss, num_classes=num_classes, kind=kind)
        return Term(name, weight, own, needs_labels=needs_labels, standardize=standardize)
    registered = LOSSES[choice]
    _check_kind(registered, choice, kind)
    check_hyperparameters(registered, hyperparameters, choice=loss)
    for constant in sorted(set(scheduled) & set(registered.constants)):
        raise UserError(f"{loss}: {constant} can't follow a schedule; it is used once, at the start")
    known = inspect.signature(registered).parameters
    values = {key: value for key, value in defaults.items() if key in known and value is not None} | hyperparameters
    built: Any
    try:
        for end in (1, 0):
            built = registered(**values | {key: schedule.extremes[end] for key, schedule in scheduled.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{loss}: {error}") from None
    if standardize and not (built.needs_teacher and callable(built)):
        raise UserError(f"{loss}: {choice} doesn't depend on the teacher's logits; remove standardize")
    needs = {"needs_teacher": built.needs_teacher, "needs_labels": built.needs_labels}
    return Term(name, weight, built, standardize=standardize, scheduled=scheduled, **needs)
