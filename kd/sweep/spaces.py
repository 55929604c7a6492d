"""Search spaces: the part of a sweep's file below ``sweep``, as Optuna's distributions."""

import json
import typing
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import FiniteFloat, ValidationError, validate_call

from kd.errors import UserError
from kd.registry import suggestion
from kd.settings import field_type, searchable_settings, setting_fields

SETTINGS = frozenset(declared.name for _, declared in setting_fields())


def read_space(name: object, space: object, *, origin: str) -> dict[str, BaseDistribution]:
    """Read the space in which a setting is searched.

    Args:
        name: The setting.
        space: ``{low: 1, high: 10}`` with ``log: true`` or ``step: 2``, a list of choices, or, for ``loss``, a mapping
            from terms to weights, each of them a number or one of these.
        origin: The place in the file, for messages.

    Returns:
        The distribution by the setting's name; for weights, those that are searched by ``loss.TERM``.

    Raises:
        UserError: If there is no such setting, it can't be searched, or the space is not legal.
    """
    if name not in SETTINGS:
        raise UserError(f"{origin}: unknown setting{suggestion(str(name), SETTINGS)}")
    if name not in searchable_settings():
        raise UserError(f"{origin}: can't be searched: all trials share one teacher, the images and the machine")
    if name == "loss" and isinstance(space, dict) and not space.keys() & {"low", "high", "log", "step"}:
        searched = {term: weight for term, weight in space.items() if isinstance(weight, dict | list)}
        if not searched:
            raise UserError(f"{origin}: no weight is searched; give one of them a range, such as {{low: 0, high: 1}}")
        return {f"loss.{term}": _read(weight, float, f"{origin}, key {term!r}") for term, weight in searched.items()}
    return {str(name): _read(space, _number_type(str(name)), origin)}


def examples_of(distribution: BaseDistribution) -> list[Any]:
    """Return values to validate before anything runs: all choices, or both ends of a range."""
    facts = vars(distribution)
    return list(facts["choices"]) if "choices" in facts else [facts["low"], facts["high"]]


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:  # noqa: ANN401 (a setting's value)
    """Draw a value for a trial."""
    draws: dict[type, Any] = {
        CategoricalDistribution: trial.suggest_categorical,
        FloatDistribution: trial.suggest_float,
        IntDistribution: trial.suggest_int,
    }
    return draws[type(distribution)](name, **vars(distribution))


def to_settings(parameters: Mapping[str, Any], searched: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a trial's parameters to settings.

    Args:
        parameters: Values by the names of the distributions.
        searched: The spaces as in the file, which hold the objective's fixed weights.

    Example:
        >>> to_settings({"loss.ce": 0.5, "assistants": '["resnet18"]'}, {"loss": {"ce": [0, 0.5], "kl": 0.9}})
        {'assistants': ['resnet18'], 'loss': {'ce': 0.5, 'kl': 0.9}}
    """
    weights = {name.removeprefix("loss."): value for name, value in parameters.items() if name.startswith("loss.")}
    values = {name: _decode(value) for name, value in parameters.items() if not name.startswith("loss.")}
    return values | ({"loss": searched["loss"] | weights} if weights else {})


def reason_of(error: Exception) -> str:
    """Return the reason in an error of pydantic, with the key, or of Optuna."""
    if not isinstance(error, ValidationError):
        return str(error)
    mistake = error.errors()[-1]
    return f"key {mistake['loc'][-1]!r}: {mistake['msg']}"


@validate_call
def _float_range(
    low: FiniteFloat, high: FiniteFloat, *, log: bool = False, step: FiniteFloat | None = None
) -> BaseDistribution:
    return FloatDistribution(low, high, log=log, step=step)


@validate_call
def _int_range(low: int, high: int, *, log: bool = False, step: int = 1) -> BaseDistribution:
    return IntDistribution(low, high, log=log, step=step)


def _read(space: object, number: type | None, origin: str) -> BaseDistribution:
    if not isinstance(space, dict | list):
        raise UserError(f"{origin}: expected a list of choices, or a range such as {{low: 1, high: 10}}, got {space!r}")
    if isinstance(space, dict) and number is None:
        raise UserError(f"{origin}: not a number; list its choices, such as [first, second]")
    try:
        # Optuna warns, and changes the range, where its length is no multiple of the step.
        with warnings.catch_warnings(action="error"):
            if isinstance(space, list):
                return CategoricalDistribution([_encode(choice) for choice in space])
            return _int_range(**space) if number is int else _float_range(**space)
    except (ValueError, TypeError, UserWarning) as error:
        raise UserError(f"{origin}: {reason_of(error)}") from None


def _encode(choice: Any) -> CategoricalChoiceType:  # noqa: ANN401 (whatever YAML holds)
    """Return a choice as Optuna can store it: a list or a mapping becomes JSON."""
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


def _decode(choice: object) -> object:
    return json.loads(choice) if isinstance(choice, str) and choice.startswith(("[", "{")) else choice


def _number_type(name: str) -> type | None:
    """Return whether a setting is a float or an int; ``None`` if it is neither, or several numbers."""
    declared = field_type(name)
    kinds = () if typing.get_origin(declared) is tuple else typing.get_args(declared) or (declared,)
    return next((kind for kind in (float, int) if kind in kinds), None)
