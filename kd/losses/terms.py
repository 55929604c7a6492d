"""What a loss is given and what it says of itself; the registry that all losses stand in."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from kd.registry import Registry


@dataclass(frozen=True)
class Outputs:
    """What a network made of a batch.

    Args:
        logits: ``(B, C)``.
        features: Feature maps ``(B, C', H, W)`` by the name of their node, for the terms that ask for them.
        gradients: ``(B, 3, S, S)``, gradient to each image of the logit that the teacher puts first, for the terms that
            ask for it.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Tensor | None = None


class LossInfo(Protocol):
    """What every loss says of itself, in a class attribute each.

    ``formula``, ``source`` and ``paper`` (the objective with the weights that were published for it, in our spelling,
    or nothing where there are none for classifiers) stand in the lists; ``needs_teacher`` and ``needs_labels`` are for
    whoever builds the step. One that needs labels and can be given them softened, ``(B, C)``, says
    ``takes_soft_labels = True``.
    """

    formula: ClassVar[str]
    source: ClassVar[str]
    paper: ClassVar[str]
    needs_teacher: ClassVar[bool]
    needs_labels: ClassVar[bool]


class Loss(LossInfo, Protocol):
    """A loss on logits."""

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch: logits ``(B, C)`` twice, labels ``(B,)``, to a scalar."""
        ...


LOSSES: Registry[type[LossInfo]] = Registry("loss")
"""The losses by name; each is a class whose parameters are the loss's hyperparameters."""


@dataclass(frozen=True)
class Softened:
    """A loss on predictions that a temperature softens: it looks at the teacher, and at no labels unless it says so.

    Args:
        temperature: Above 0, dimensionless; 1 leaves the predictions as they are.

    Raises:
        ValueError: If ``temperature`` is not positive.
    """

    temperature: float = 4.0

    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a temperature at which nothing is defined."""
        given = self.temperature
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
            raise ValueError(f"temperature must be above 0, and is {given}")


def hyperparameters_of(loss: type[LossInfo]) -> str:
    """Write down the hyperparameters of a loss with their defaults, as ``alpha=1.0, beta=8.0``."""
    return ", ".join(f"{one.name}={one.default}" for one in inspect.signature(loss).parameters.values())


def markdown_table() -> str:
    """Return all losses as a Markdown table, as it stands in the README."""
    headings = ("name", "formula", "hyperparameters", "`--loss`, as published", "source")
    rows = [
        (f"`{name}`", loss.formula, hyperparameters_of(loss), _code(loss.paper), loss.source)
        for name, loss in LOSSES.items()
    ]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [headings, ("---",) * len(headings), *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
