"""What a loss computes from, the base class of all losses, and their registry."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from kd.registry import Registry


@dataclass(frozen=True)
class Outputs:
    """A network's outputs for one batch.

    Args:
        logits: ``(B, C)``.
        features: Feature maps ``(B, C', H, W)`` by node name, for the terms that compare features.
        gradients: ``(B, 3, S, S)``, gradient of the teacher's top-1 logit with respect to each image, for the terms
            that compare input gradients.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Tensor | None = None


def bounded(default: float, is_valid: Callable[[float], bool], description: str) -> Any:  # noqa: ANN401 (a field)
    """Declare a number with a range; ``description`` says what is valid, such as ``a number above 0``."""
    return field(default=default, metadata={"is_valid": is_valid, "description": description})


POSITIVE: tuple[Callable[[float], bool], str] = (lambda value: value > 0, "a number above 0")


@dataclass(frozen=True)
class BaseLoss:
    """Base class of all losses; the dataclass fields of a subclass are its hyperparameters.

    Attributes:
        formula: The formula in one line of plain text.
        source: Authors, year, and section.
        published: The objective with its published weights, or nothing where none was published for classifiers.
        needs_teacher: Whether the loss depends on the teacher.
        needs_labels: Whether the loss depends on the labels.
        takes_soft_labels: Whether the labels may be class probabilities ``(B, C)``.
        is_multilabel: Whether it is defined with several labels an image, ``(B, C)`` of 0 and 1.
        is_single_label: Whether it is defined with one.
        constants: Hyperparameters that can't follow a schedule, since they are used only once, when the loss is built.

    Raises:
        ValueError: If a hyperparameter has the wrong type or is out of range.
    """

    formula: ClassVar[str]
    source: ClassVar[str]
    published: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    takes_soft_labels: ClassVar[bool] = False
    is_multilabel: ClassVar[bool] = False
    is_single_label: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the type and the range of each hyperparameter."""
        for parameter in fields(self):
            name, kind, bounds = parameter.name, parameter.type, parameter.metadata
            value = getattr(self, name)
            if name == "class_weights":
                valid_weights = all(isinstance(each, int | float) and 0 <= each < math.inf for each in value)
                if not valid_weights or (value and not any(value)):
                    raise ValueError(f"{name} must be numbers of at least 0, not all 0, not {value!r}")
            if kind is bool and not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, not {value!r}")
            if kind in (int, float):
                valid = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
                if not (valid and math.isfinite(value) and bounds.get("is_valid", lambda _: True)(value)):
                    raise ValueError(f"{name} must be {bounds.get('description', 'a finite number')}, not {value!r}")


@dataclass(frozen=True)
class LogitLoss(BaseLoss):
    """Base class of the losses on logits.

    Shape:
        - student: ``(B, C)``, logits $z$.
        - teacher: ``(B, C)``, logits $v$, without gradient.
        - labels: ``(B,)``, integers from 0 to C - 1, or ``(B, C)``, probabilities, if ``takes_soft_labels`` is true.
        - returns: scalar, the mean over the batch.
    """

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        raise NotImplementedError


@dataclass(frozen=True)
class SoftenedLoss(LogitLoss):
    """Base class of the losses on predictions softened by a temperature.

    Args:
        temperature: $T > 0$, dimensionless; 1 compares the predictions as they are.
    """

    temperature: float = bounded(4.0, *POSITIVE)


def unit_vectors(vectors: Tensor, *, floor: float | Tensor = 0.01) -> Tensor:
    """Scale vectors ``(..., N)`` to norm 1; divide those shorter than ``floor`` by it, which bounds the gradient."""
    # Divided by the largest magnitude first, so that no square overflows or vanishes.
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True).clamp(min=torch.as_tensor(floor, device=vectors.device))
    scaled = vectors / largest
    normalized: Tensor = scaled / scaled.norm(dim=-1, keepdim=True).clamp(min=1.0)
    return normalized


LOSSES: Registry[type[BaseLoss]] = Registry("loss")
"""The losses by name."""


def hyperparameters_of(loss: type[BaseLoss]) -> str:
    """Return the hyperparameters of a loss with their defaults, such as ``alpha=1.0, beta=8.0``."""
    parameters = inspect.signature(loss).parameters.values()
    return ", ".join(f"{parameter.name}={parameter.default}" for parameter in parameters)
