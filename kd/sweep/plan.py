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
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from kd.errors import UserError
from kd.registry import suggestion
from kd.settings import Resolved, Settings, per_machine_settings, read_yaml, resolve, with_origin
from kd.sweep.spaces import SETTINGS, examples_of, read_space, reason_of, to_settings

_OPTIONS = ("trials", "prune", "sampler_seed", "lost_after")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
class Plan:
    """A sweep: its fixed settings, what is searched, and how.

    Args:
        file: The file that it was read from.
        fixed: The ordinary settings in the file.
        searched: The content of the key ``sweep``.
        spaces: The distribution of each parameter.
        trials: Number of trials to finish; pruned and failed ones count.
        prune: Whether to stop a trial whose accuracy is below the median of the others at the same epoch.
        sampler_seed: Random seed of the search.
        lost_after: Seconds without a heartbeat after which a worker counts as killed and its trial is retried.
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
        """Return the settings of a trial.

        Args:
            parameters: The trial's parameters.
            overrides: Settings that the sweep determines, such as the trial's folder.

        Raises:
            UserError: If a value is not legal.
        """
        devices = self.resolved.settings.machine.devices
        own = {"distill": True, "devices": "1" if devices == "auto" else devices}
        return self._resolve(to_settings(parameters or {}, self.searched), own | overrides).settings

    def explain(self, error: UserError) -> UserError:
        """Return an error that adds where the flag in its message was set."""
        searched = {name: f"{self.file}, key 'sweep', key {name!r}" for name in self.searched}
        return UserError(with_origin(str(error), self.resolved.origins | searched))

    def examples(self) -> list[dict[str, Any]]:
        """Return parameters to validate before anything runs: each example of one beside the first of the others."""
        examples = {name: examples_of(space) for name, space in self.spaces.items()}
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
    """Read a sweep's file and validate it, including every choice and both ends of every range.

    Raises:
        UserError: If something in it is wrong; the message names the file and the key.
    """
    fixed = read_yaml(file)
    searched = fixed.pop("sweep", None)
    if not isinstance(searched, dict) or not searched:
        raise UserError(f"{file}, key 'sweep': expected the settings to search, such as temperature: [1, 2, 4]")
    options = {name: fixed.pop(name) for name in _OPTIONS if name in fixed}
    for name in fixed:
        if name not in SETTINGS:
            raise UserError(f"{file}, key {name!r}: unknown setting{suggestion(str(name), [*SETTINGS, *_OPTIONS])}")
        if name in searched:
            raise UserError(f"{file}, key {name!r}: also under 'sweep'; remove one of them")
    spaces: dict[str, BaseDistribution] = {}
    for name, space in searched.items():
        spaces |= read_space(name, space, origin=f"{file}, key 'sweep', key {name!r}")
    try:
        plan = Plan(file=file, fixed=fixed, searched=searched, spaces=spaces, **options)
    except ValidationError as error:
        raise UserError(f"{file}, {reason_of(error)}") from None
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
        raise plan.explain(
            UserError("--devices, --num_nodes: a trial runs on one device; use --workers for more trials")
        )
