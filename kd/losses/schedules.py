"""Numbers that change over the epochs: the weight of a term, or a hyperparameter such as the temperature."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from kd.errors import UserError
from kd.registry import Call, Registry

SCHEDULES: Registry[Callable[..., float]] = Registry("schedule")
"""Schedules by name: functions of the epoch (from 0), the number of epochs, and what stands in the parentheses."""


@SCHEDULES.register("warmup")
def warmup(epoch: int, epochs: int, value: float, over: float) -> float:  # noqa: ARG001 (one signature)
    """Rise in equal steps to ``value``, which is reached in epoch number ``over`` (counted from 1), and stay.

    Example:
        >>> [warmup(epoch, 5, 0.9, 3) for epoch in range(5)]
        [0.3, 0.6, 0.9, 0.9, 0.9]
    """
    return round(value * min(1.0, (epoch + 1) / over), 12)


@SCHEDULES.register("linear")
def linear(epoch: int, epochs: int, start: float, end: float) -> float:
    """Go from ``start`` in the first epoch to ``end`` in the last, in equal steps.

    Example:
        >>> [linear(epoch, 5, 8, 2) for epoch in range(5)]
        [8.0, 6.5, 5.0, 3.5, 2.0]
    """
    return start + (end - start) * _progress(epoch, epochs)


@SCHEDULES.register("cosine")
def cosine(epoch: int, epochs: int, start: float, end: float) -> float:
    """Go from ``start`` in the first epoch to ``end`` in the last, along half a cosine.

    Example:
        >>> [cosine(epoch, 3, 8, 2) for epoch in range(3)]
        [8.0, 5.0, 2.0]
    """
    return end + (start - end) * (1 + math.cos(math.pi * _progress(epoch, epochs))) / 2


@SCHEDULES.register("stop")
def stop(epoch: int, epochs: int, value: float, after: float) -> float:  # noqa: ARG001 (one signature)
    """Stay at ``value`` for ``after`` epochs, and be 0 from then on; Cho & Hariharan (2019), arXiv:1910.01348.

    Example:
        >>> [stop(epoch, 4, 0.9, 2) for epoch in range(4)]
        [0.9, 0.9, 0.0, 0.0]
    """
    return value if epoch < after else 0.0


@dataclass(frozen=True)
class Schedule:
    """A number that changes over the epochs.

    Args:
        name: Its name in :data:`SCHEDULES`.
        arguments: What stands in the parentheses.
    """

    name: str
    arguments: tuple[float, ...]

    @classmethod
    def from_call(cls, call: Call) -> "Schedule":
        """Read a schedule as it is written, ``warmup(0.9, 20)``.

        Raises:
            UserError: If there is no such schedule, or it takes other numbers.
        """
        function = SCHEDULES[call.name]
        names = list(inspect.signature(function).parameters)[2:]
        numbers = [one for one in call.arguments if isinstance(one, int | float) and not isinstance(one, bool)]
        if len(numbers) != len(names) or len(call.arguments) != len(names) or not all(map(math.isfinite, numbers)):
            raise UserError(f"{call}: it takes numbers, {call.name}({', '.join(names)})")
        if call.name == "warmup" and not numbers[1] > 0:
            raise UserError(f"{call}: a warm-up takes more than 0 epochs")
        return cls(call.name, tuple(numbers))

    def at(self, epoch: int, epochs: int) -> float:
        """Return the number in an epoch (from 0) of a training of so many epochs."""
        return SCHEDULES[self.name](epoch, epochs, *self.arguments)


def _progress(epoch: int, epochs: int) -> float:
    return epoch / (epochs - 1) if epochs > 1 else 0.0
