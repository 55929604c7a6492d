"""What a setting is searched in: a range, a list of choices, or a weight for each term of the objective."""

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd.errors import UserError
from kd.registry import suggestion
from kd.settings import setting_fields

if TYPE_CHECKING:
    import optuna

_FIELDS = {one.name: (section, one) for section, one in setting_fields()}
_RANGE_KEYS = ("low", "high", "log", "step")

# All trials learn from one teacher, on the same images, on a machine that is what it is.
_FIXED_SECTIONS = frozenset(("phases", "machine", "sources"))
_FIXED = frozenset(
    (
        *("dataset", "data_dir", "train_data", "val_data", "num_classes", "num_workers", "download", "image_size"),
        *("resize", "augment_on", "image_cache", "on_bad_image", "compare_losses"),
    )
)


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both of them included.

    Args:
        low: The least.
        high: The greatest.
        log: Whether 1 to 10 is as likely as 10 to 100.
        step: The distance between neighbors; ``None``: any number in between.
        whole: Whether they are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def suggest(self, trial: "optuna.Trial", name: str) -> float:
        """Draw a value for a trial."""
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log, step=step)
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def examples(self) -> list[Any]:
        """Return the values that are tried before anything runs: where the ends are right, so is what lies between."""
        return [int(end) if self.whole else end for end in (self.low, self.high)]


@dataclass(frozen=True)
class Choices:
    """Some values, none of them nearer to one than to another.

    Args:
        options: By how each is shown.
    """

    options: Mapping[str, Any]

    def suggest(self, trial: "optuna.Trial", name: str) -> Any:  # noqa: ANN401 (a setting's value)
        """Draw a value for a trial."""
        return self.options[trial.suggest_categorical(name, list(self.options))]

    def examples(self) -> list[Any]:
        """Return the values that are tried before anything runs: all of them."""
        return list(self.options.values())


@dataclass(frozen=True)
class Weights:
    """A weight for each term of the objective; those that are searched go by ``loss.TERM``.

    Args:
        terms: By term, its weight or where that is searched.
    """

    terms: Mapping[str, float | Range | Choices]

    def suggest(self, trial: "optuna.Trial", name: str) -> dict[str, Any]:
        """Draw a value for a trial."""
        return {
            term: weight.suggest(trial, f"{name}.{term}") if isinstance(weight, Range | Choices) else weight
            for term, weight in self.terms.items()
        }

    def examples(self) -> list[Any]:
        """Return the values that are tried before anything runs: each weight's own, beside the first of the others."""
        tried = {
            term: weight.examples() if isinstance(weight, Range | Choices) else [weight]
            for term, weight in self.terms.items()
        }
        first = {term: some[0] for term, some in tried.items()}
        return [first, *(first | {term: one} for term, some in tried.items() for one in some[1:])]


Space = Range | Choices | Weights


def read_space(name: object, written: object, *, origin: str) -> Space:
    """Read what a setting is searched in.

    Args:
        name: The setting.
        written: ``{low: 1, high: 10}`` with ``log: true`` or ``step: 2``, a list of choices, or, for ``loss``, a
            mapping from terms to weights, each of them a number or one of these.
        origin: Where it stands, for the messages.

    Raises:
        UserError: If there is no such setting, it can't be searched, or no value would be legal.
    """
    if not isinstance(name, str) or name not in _FIELDS:
        raise UserError(f"{origin}: there is no such setting{suggestion(str(name), _FIELDS)}")
    section, _ = _FIELDS[name]
    if section in _FIXED_SECTIONS or name in _FIXED or name.startswith("teacher_"):
        raise UserError(
            f"{origin}: this can't be searched: all trials learn from one teacher, on the same images and machine"
        )
    if name == "loss" and isinstance(written, dict) and not written.keys() & set(_RANGE_KEYS):
        terms = {str(term): _weight(one, origin=f"{origin}, key {term!r}") for term, one in written.items()}
        if all(isinstance(weight, float) for weight in terms.values()):
            raise UserError(f"{origin}: no weight is searched; give one of them a range, such as {{low: 0, high: 1}}")
        return Weights(terms)
    return _read(written, kind=_kind_of(name), origin=origin)


def _weight(written: object, *, origin: str) -> float | Range | Choices:
    several = isinstance(written, dict | list)
    weight = _read(written, kind=float, origin=origin) if several else _number(written, origin=origin)
    for one in [weight] if isinstance(weight, float) else weight.examples():
        if _number(one, origin=origin) < 0:
            raise UserError(f"{origin}: a weight must be 0 or more, and is {one}")
    return weight


def _read(written: object, *, kind: type | None, origin: str) -> Range | Choices:
    if isinstance(written, list):
        return _choices(written, origin=origin)
    if not isinstance(written, dict):
        raise UserError(
            f"{origin}: a list of choices stands here, or a range such as {{low: 1, high: 10}}, not {written!r}"
        )
    if kind is None:
        raise UserError(f"{origin}: this takes no number; list its choices, such as [one, other]")
    return _range(written, whole=kind is int, origin=origin)


def _choices(written: Sequence[object], *, origin: str) -> Choices:
    shown = [_shown(one) for one in written]
    if not shown:
        raise UserError(f"{origin}: there is nothing to choose from")
    if len(set(shown)) < len(shown):
        raise UserError(f"{origin}: {max(shown, key=shown.count)} stands there twice")
    return Choices(dict(zip(shown, written, strict=True)))


def _shown(option: object) -> str:
    if isinstance(option, dict):
        return " ".join(f"{name}={weight}" for name, weight in option.items())
    return " ".join(map(str, option)) if isinstance(option, list) else str(option)


def _range(written: Mapping[Any, Any], *, whole: bool, origin: str) -> Range:
    for key in written:
        if key not in _RANGE_KEYS:
            hint = suggestion(str(key), _RANGE_KEYS)
            raise UserError(f"{origin}: a range has low, high, log and step, and no {key!r}{hint}")
    for key in ("low", "high"):
        if key not in written:
            raise UserError(f"{origin}: the range has no {key}")
    numbers = {
        key: _number(written[key], origin=f"{origin}, key {key!r}", whole=whole)
        for key in ("low", "high", "step")
        if key in written
    }
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    log = written.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{origin}, key 'log': this is true or false, not {log!r}")
    if not low < high:
        raise UserError(f"{origin}: low must be below high, and they are {low:g} and {high:g}")
    if log and low <= 0:
        raise UserError(f"{origin}: with log, low must be above 0, and is {low:g}")
    if step is not None and log:
        raise UserError(f"{origin}: there is no step with log")
    if step is not None and not (step > 0 and math.isclose((high - low) / step, max(1, round((high - low) / step)))):
        raise UserError(f"{origin}: so many steps of {step:g} do not lead from {low:g} to {high:g}")
    return Range(low, high, log=log, step=step, whole=whole)


def _number(written: object, *, origin: str, whole: bool = False) -> float:
    # 1e-4 is a word to YAML, which wants 1.0e-4.
    try:
        number = math.nan if isinstance(written, bool) else float(written)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{origin}: this is a number, not {written!r}")
    if whole and not number.is_integer():
        raise UserError(f"{origin}: this is a whole number, not {written!r}")
    return number


def _kind_of(name: str) -> type | None:
    """Say which numbers a setting takes; ``None`` where it takes none, or several."""
    declared: Any = _FIELDS[name][1].type
    if typing.get_origin(declared) is tuple:
        return None
    kinds = typing.get_args(declared) or (declared,)
    return float if float in kinds else int if int in kinds else None
