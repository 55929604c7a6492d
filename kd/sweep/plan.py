"""A sweep's YAML file: ordinary settings, what is searched, and how.

.. code-block:: yaml

    trials: 30              # number of trials to finish; pruned and failed ones count
    prune: true             # stop a trial whose accuracy is below the median of the others at the same epoch
    sampler_seed: 0         # random seed of the search
    lost_after: 60          # seconds without a heartbeat after which a worker counts as killed and its trial is retried
    sweep:
      learning_rate: {low: 1e-4, high: 1e-1, log: true}     # a range, both ends included
      max_epochs: {low: 10, high: 30, step: 10}             # integers, where the setting is one
      student_model: [simple, resnet18]                     # choices
      loss: {ce: {low: 0, high: 1}, kl: 0.9}                # weights of the objective's terms

A list under ``loss`` is a choice between whole objectives. The search maximizes the distilled student's validation
accuracy after the last epoch, averaged over ``seeds``.
"""

import functools
import json
import re
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ConfigDict, Field, FiniteFloat, ValidationError, validate_call
from pydantic.dataclasses import dataclass

from kd.errors import UserError
from kd.registry import suggestion
from kd.settings import (
    Resolved,
    Settings,
    field_type,
    per_machine_settings,
    read_yaml,
    resolve,
    searchable_settings,
    setting_fields,
    with_origin,
)

_SETTINGS = frozenset(declared.name for _, declared in setting_fields())
_OPTIONS = ("trials", "prune", "sampler_seed", "lost_after")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
class Plan:
    """The content of a sweep's file: ordinary settings (``fixed``), the key ``sweep`` (``searched``), and options.

    ``spaces`` are the distributions by parameter: the name of a setting, or ``loss.TERM`` for the weight of a term.
    """

    file: Path
    fixed: dict[Any, Any]
    searched: dict[Any, Any]
    spaces: dict[str, BaseDistribution]
    trials: int = Field(20, ge=1)
    prune: bool = True
    sampler_seed: int = Field(0, ge=0)
    lost_after: int = Field(60, ge=10)

    @functools.cached_property
    def resolved(self) -> Resolved:
        """The fixed settings."""
        return self._resolve({}, {})

    @functools.cached_property
    def folder(self) -> Path:
        """The sweep's folder, named by the setting ``name`` or else after the file."""
        settings = self.resolved.settings
        return Path(settings.machine.default_root_dir).expanduser() / (settings.phases.name or self.file.stem)

    def settings(self, parameters: Mapping[str, Any] | None = None, **overrides: Any) -> Settings:
        """Return the settings of a trial; ``overrides`` are those that the sweep determines, such as its folder."""
        devices = self.resolved.settings.machine.devices
        own = {"distill": True, "devices": "1" if devices == "auto" else devices}
        return self._resolve(_to_settings(parameters or {}, self.searched), own | overrides).settings

    def explain(self, error: UserError) -> UserError:
        """Return an error that adds where the flag in its message was set."""
        searched = {name: f"{self.file}, key 'sweep', key {name!r}" for name in self.searched}
        return UserError(with_origin(str(error), self.resolved.origins | searched))

    def examples(self) -> list[dict[str, Any]]:
        """Return parameters to validate before anything runs: all choices and the ends of ranges, one at a time."""
        facts = {name: vars(space) for name, space in self.spaces.items()}
        examples = {name: each.get("choices") or (each["low"], each["high"]) for name, each in facts.items()}
        first = {name: values[0] for name, values in examples.items()}
        return [first, *(first | {name: value} for name, values in examples.items() for value in values[1:])]

    def definition(self) -> dict[str, Any]:
        """Return what all workers of the sweep, and all calls that resume it, must have in common."""
        flat = self.resolved.settings.flat()
        shared = {name: value for name, value in flat.items() if name not in per_machine_settings()}
        options = {name: getattr(self, name) for name in _OPTIONS if name != "trials"}
        return shared | options | {f"sweep, {name}": space for name, space in self.searched.items()}

    def _resolve(self, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Resolved:
        sources = {str(self.file): self.fixed, f"{self.file}, key 'sweep'": values, "kd sweep": overrides}
        return resolve([], prog="kd sweep", values=sources)


def read_plan(file: Path) -> Plan:
    """Read a sweep's file and validate it, including every choice and both ends of every range."""
    fixed = read_yaml(file)
    searched = fixed.pop("sweep", None)
    if not isinstance(searched, dict) or not searched:
        raise UserError(f"{file}, key 'sweep': expected the settings to search, such as temperature: [1, 2, 4]")
    options = {name: fixed.pop(name) for name in _OPTIONS if name in fixed}
    for name in fixed:
        if name not in _SETTINGS:
            raise UserError(f"{file}, key {name!r}: unknown setting{suggestion(str(name), [*_SETTINGS, *_OPTIONS])}")
        if name in searched:
            raise UserError(f"{file}, key {name!r}: also under 'sweep'; remove one of them")
    spaces: dict[str, BaseDistribution] = {}
    for name, space in searched.items():
        spaces |= _read_spaces(name, space, f"{file}, key 'sweep', key {name!r}")
    try:
        plan = Plan(file=file, fixed=fixed, searched=searched, spaces=spaces, **options)
    except ValidationError as error:
        raise UserError(f"{file}, {_reason(error)}") from None
    _check_settings(plan)
    for parameters in plan.examples():
        plan.settings(parameters)
    return plan


def _check_settings(plan: Plan) -> None:
    """Refuse fixed settings that have no meaning in a sweep."""
    settings = plan.settings().flat()
    for name in ("baseline", "compare_losses", "resume", "fast_dev_run"):
        if settings[name]:
            raise plan.explain(UserError(f"--{name}: has no meaning in a sweep; remove it"))
    if settings["num_nodes"] > 1 or not re.fullmatch(r"1|\d+,", settings["devices"]):
        problem = "a trial runs on one device; use --workers for more trials"
        raise plan.explain(UserError(f"--devices, --num_nodes: {problem}"))


def _read_spaces(name: object, space: object, origin: str) -> dict[str, BaseDistribution]:
    """Return the distributions of a setting, or of the weights that are searched; ``origin`` is the place in the file.

    A space is ``{low: 1, high: 10}`` with ``log: true`` or ``step: 2``, a list of choices, or, for ``loss``, a mapping
    from terms to weights, each of them a number or one of these.
    """
    if name not in _SETTINGS:
        raise UserError(f"{origin}: unknown setting{suggestion(str(name), _SETTINGS)}")
    if name not in searchable_settings():
        raise UserError(f"{origin}: can't be searched: all trials share one teacher, the images and the machine")
    if name == "loss" and isinstance(space, dict) and not space.keys() & {"low", "high", "log", "step"}:
        searched = {term: weight for term, weight in space.items() if isinstance(weight, dict | list)}
        if not searched:
            raise UserError(f"{origin}: no weight is searched; give one of them a range, such as {{low: 0, high: 1}}")
        return {
            f"loss.{term}": _read_space(weight, float, f"{origin}, key {term!r}") for term, weight in searched.items()
        }
    declared = field_type(str(name))
    kinds = () if typing.get_origin(declared) is tuple else typing.get_args(declared) or (declared,)
    return {str(name): _read_space(space, next((kind for kind in (float, int) if kind in kinds), None), origin)}


def _read_space(space: object, number: type | None, origin: str) -> BaseDistribution:
    """Return the distribution of a float, an int, or (``None``) a setting that has only choices."""
    if not isinstance(space, dict | list):
        raise UserError(f"{origin}: expected a list of choices, or a range such as {{low: 1, high: 10}}, got {space!r}")
    if isinstance(space, dict) and number is None:
        raise UserError(f"{origin}: not a number; list its choices, such as [first, second]")
    try:
        # Optuna warns, and changes the range, where its length is no multiple of the step.
        with warnings.catch_warnings(action="error"):
            if isinstance(space, list):
                # Optuna can't store a list or a mapping.
                plain = [json.dumps(choice) if isinstance(choice, list | dict) else choice for choice in space]
                return CategoricalDistribution(plain)
            return _int_range(**space) if number is int else _float_range(**space)
    except (ValueError, TypeError, UserWarning) as error:
        raise UserError(f"{origin}: {_reason(error)}") from None


@validate_call
def _float_range(
    low: FiniteFloat, high: FiniteFloat, *, log: bool = False, step: FiniteFloat | None = None
) -> BaseDistribution:
    return FloatDistribution(low, high, log=log, step=step)


@validate_call
def _int_range(low: int, high: int, *, log: bool = False, step: int = 1) -> BaseDistribution:
    return IntDistribution(low, high, log=log, step=step)


def _reason(error: Exception) -> str:
    """Return the reason in an error of pydantic, with the key, or of Optuna."""
    if not isinstance(error, ValidationError):
        return str(error)
    mistake = error.errors()[-1]
    return f"key {mistake['loc'][-1]!r}: {mistake['msg']}"


def _to_settings(parameters: Mapping[str, Any], searched: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a trial's parameters to settings; ``searched`` holds the objective's fixed weights.

    Example:
        >>> _to_settings({"loss.ce": 0.5, "assistants": '["resnet18"]'}, {"loss": {"ce": [0, 0.5], "kl": 0.9}})
        {'assistants': ['resnet18'], 'loss': {'ce': 0.5, 'kl': 0.9}}
    """
    weights = {name.removeprefix("loss."): value for name, value in parameters.items() if name.startswith("loss.")}
    values = {
        name: json.loads(value) if isinstance(value, str) and value.startswith(("[", "{")) else value
        for name, value in parameters.items()
        if not name.startswith("loss.")
    }
    return values | ({"loss": searched["loss"] | weights} if weights else {})
