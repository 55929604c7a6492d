"""Schedules over the epochs, for the weight of a term or a hyperparameter such as the temperature."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from kd.errors import UserError
from kd.registry import Call, Registry

SCHEDULES: Registry[Callable[..., float]] = Registry("schedule")
"""Schedules by name: functions of the epoch (from 0), the number of epochs, and the schedule's own numbers."""

_FOREVER = 10**9


@SCHEDULES.register("warmup")
def warmup(epoch: int, epochs: int, value: float, over: float) -> float:  # noqa: ARG001 (shared signature)
    """Rise linearly to ``value`` in the first ``over`` epochs, then stay constant.

    Example:
        >>> [warmup(epoch, 5, 0.9, 3) for epoch in range(5)]
        [0.3, 0.6, 0.9, 0.9, 0.9]
    """
    return round(value * min(1.0, (epoch + 1) / over), 12)


@SCHEDULES.register("linear")
def linear(epoch: int, epochs: int, start: float, end: float) -> float:
    """Interpolate linearly from ``start`` in the first epoch to ``end`` in the last.

    Example:
        >>> [linear(epoch, 5, 8, 2) for epoch in range(5)]
        [8.0, 6.5, 5.0, 3.5, 2.0]
    """
    return start + (end - start) * _progress(epoch, epochs)


@SCHEDULES.register("cosine")
def cosine(epoch: int, epochs: int, start: float, end: float) -> float:
    """Anneal along half a cosine from ``start`` in the first epoch to ``end`` in the last.

    Example:
        >>> [cosine(epoch, 3, 8, 2) for epoch in range(3)]
        [8.0, 5.0, 2.0]
    """
    return end + (start - end) * (1 + math.cos(math.pi * _progress(epoch, epochs))) / 2


@SCHEDULES.register("stop")
def stop(epoch: int, epochs: int, value: float, after: float) -> float:  # noqa: ARG001 (shared signature)
    """Stay at ``value`` for ``after`` epochs, then drop to 0; Cho & Hariharan (2019), https://arxiv.org/abs/1910.01348.

    Example:
        >>> [stop(epoch, 4, 0.9, 2) for epoch in range(4)]
        [0.9, 0.9, 0.0, 0.0]
    """
    return value if epoch < after else 0.0


@dataclass(frozen=True)
class Schedule:
    """A number that changes over the epochs: the name of a schedule, and its arguments after the epochs."""

    name: str
    arguments: tuple[float, ...]

    @classmethod
    def from_call(cls, call: Call) -> "Schedule":
        """Build a schedule from its written form; a ``UserError`` if it is unknown or its arguments are wrong."""
        function = SCHEDULES[call.name]
        names = list(inspect.signature(function).parameters)[2:]
        numbers = [value for value in call.arguments if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) != len(names) or len(call.arguments) != len(names) or not all(map(math.isfinite, numbers)):
            raise UserError(f"{call}: write it with numbers, as {call.name}({', '.join(names)})")
        if call.name == "warmup" and not numbers[1] > 0:
            raise UserError(f"{call}: the warm-up must take more than 0 epochs")
        return cls(call.name, tuple(numbers))

    def at(self, epoch: int, epochs: int) -> float:
        """Return the value in ``epoch`` (from 0) of a training of ``epochs`` epochs."""
        return SCHEDULES[self.name](epoch, epochs, *self.arguments)

    @property
    def extremes(self) -> tuple[float, float]:
        """The first and the last value of a very long training; every schedule is monotonic between them."""
        return self.at(0, _FOREVER), self.at(_FOREVER - 1, _FOREVER)


def _progress(epoch: int, epochs: int) -> float:
    return epoch / (epochs - 1) if epochs > 1 else 0.0
