"""What a sweep searches, read from one YAML file: ordinary settings, and beside them what is searched.

.. code-block:: yaml

    trials: 30              # how many are finished, or pruned, in the end
    prune: true             # end a trial early that is below the median of the others at the same epoch
    sampler_seed: 0         # what the search draws
    lost_after: 60          # seconds without a sign of life after which a worker's trial is lost
    sweep:
      learning_rate: {low: 1e-4, high: 1e-1, log: true}     # a range, both ends included
      max_epochs: {low: 10, high: 30, step: 10}             # of whole numbers, where the setting is one
      student_model: [simple, resnet18]                     # choices
      loss: {ce: {low: 0, high: 1}, kl: 0.9}                # the weight of a term, or of several

The objective's weights are written as in any other file of settings, with a range where a weight would stand; a list
under ``loss`` is one of whole objectives. What is searched is the accuracy of the distilled student on the validation
images after the last epoch (the mean over ``seeds``), and more is better.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.registry import suggestion
from kd.settings import Resolved, Settings, read_yaml, resolve, setting_fields, with_origin
from kd.sweep.spaces import Space, read_space

SWEEP = "sweep"
_TRIAL = "the sweep"

# What may differ between the workers of one sweep.
_OWN = frozenset(
    (
        *("name", "train_teacher", "strict", "data_dir", "num_workers", "download", "augment_on"),
        *("image_cache", "teacher_cache", "teacher_checkpoint", "distill"),
    )
)


@dataclass(frozen=True)
class Plan:
    """What is searched, where, and how long.

    Args:
        file: The file that it was read from.
        ordinary: Its ordinary settings, as they stand there.
        written: Its spaces, as they stand there.
        spaces: By setting, where it is searched.
        trials: How many trials are finished or pruned in the end.
        prune: Whether a trial that is worse than most is ended early.
        sampler_seed: What the search draws.
        lost_after: Seconds without a sign of life after which a worker's trial is lost.
    """

    file: Path
    ordinary: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    spaces: Mapping[str, Space] = field(default_factory=dict)
    trials: int = 20
    prune: bool = True
    sampler_seed: int = 0
    lost_after: float = 60.0

    @property
    def name(self) -> str:
        """The sweep's name, and that of its folder: from ``name``, or the file's."""
        return self._resolved.settings.phases.name or self.file.stem

    @property
    def root(self) -> Path:
        """Folder of all experiments."""
        return Path(self._resolved.settings.machine.default_root_dir).expanduser()

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self.root / self.name

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is trained where there is none yet."""
        return self._resolved.settings.phases.train_teacher

    def settings(self, values: Mapping[str, Any] | None = None, **fixed: Any) -> Settings:
        """Return the settings of a trial, through the one parser.

        Args:
            values: What the search chose.
            fixed: What every trial has.

        Raises:
            UserError: If a value is not legal.
        """
        own = {"distill": True, "devices": _device(self._resolved.settings.machine.devices)}
        return self._parsed(values or {}, own | fixed).settings

    def explain(self, error: UserError) -> UserError:
        """Return a mistake with where the flag that it names was given."""
        searched = {name: f"{self.file}, key {SWEEP!r}, key {name!r}" for name in self.spaces}
        return UserError(with_origin(str(error), self._resolved.origins | searched))

    def definition(self) -> dict[str, Any]:
        """Return what all workers of a sweep, and all calls that go on with it, must agree about."""
        flat = self._resolved.settings.flat()
        machine = {one.name for section, one in setting_fields() if section == "machine"}
        shared = machine - {"limit_train_batches", "limit_val_batches", "precision"}
        settings = {name: value for name, value in flat.items() if name not in shared | _OWN}
        own = {"prune": self.prune, "sampler_seed": self.sampler_seed, "lost_after": self.lost_after}
        return settings | own | {f"{SWEEP}, {name}": written for name, written in self.written.items()}

    @functools.cached_property
    def _resolved(self) -> Resolved:
        return self._parsed({}, {})

    def _parsed(self, values: Mapping[str, Any], fixed: Mapping[str, Any]) -> Resolved:
        sources = {str(self.file): self.ordinary, f"{self.file}, key {SWEEP!r}": values, _TRIAL: fixed}
        return resolve([], prog="kd sweep", values=sources)


def read_plan(file: Path) -> Plan:
    """Read a sweep's file, and try every choice and the ends of every range on the settings' parser.

    Raises:
        UserError: If something in it is not understood; the message names the file and the key.
    """
    values = read_yaml(file)
    written = values.pop(SWEEP, None)
    if not isinstance(written, dict) or not written:
        raise UserError(f"{file}, key {SWEEP!r}: here stand the settings to search, such as temperature: [1, 2, 4]")
    own = {key: values.pop(key) for key in _OWN_KEYS if key in values}
    for key, value in own.items():
        own[key] = _own_value(key, value, origin=f"{file}, key {key!r}")
    for key in values:
        if key not in {one.name for _, one in setting_fields()} and suggestion(str(key), [*_OWN_KEYS, SWEEP]):
            hint = suggestion(str(key), [*_OWN_KEYS, SWEEP])
            raise UserError(f"{file}, key {key!r}: there is no such setting{hint}")
    spaces = {
        name: read_space(name, one, origin=f"{file}, key {SWEEP!r}, key {name!r}") for name, one in written.items()
    }
    for name in spaces:
        if name in values:
            raise UserError(
                f"{file}, key {name!r}: this is searched, so that it has no one value; take one of them out"
            )
    plan = Plan(file, values, written, spaces, **own)
    _check_settings(plan)
    for name, space in spaces.items():
        for example in space.examples():
            plan.settings({name: example})
    return plan


_OWN_KEYS = ("trials", "prune", "sampler_seed", "lost_after")


def _own_value(key: str, value: object, *, origin: str) -> bool | float:
    """Read one of the keys of the search itself."""
    if key == "prune":
        if not isinstance(value, bool):
            raise UserError(f"{origin}: this is true or false, not {value!r}")
        return value
    is_whole = key != "lost_after"
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
        raise UserError(f"{origin}: this is a {'whole ' if is_whole else ''}number, not {value!r}")
    least = 0 if key == "sampler_seed" else 1
    if not least <= value < math.inf:
        raise UserError(f"{origin}: this must be at least {least}, and is {value}")
    return value


def _check_settings(plan: Plan) -> None:
    """Refuse ordinary settings that make no sense in a sweep."""
    settings = plan.settings()
    phases, machine = settings.phases, settings.machine
    for is_set, words in (
        (phases.baseline, "--baseline: the trials of a sweep train the distilled student alone"),
        (bool(settings.objective.compare_losses), "--compare_losses: a sweep searches objectives under 'loss'"),
        (phases.resume is not None, "--resume: a sweep goes on by itself where it was cut off"),
        (machine.fast_dev_run, "--fast_dev_run: its accuracies mean nothing; try the sweep with few trials"),
        (machine.num_nodes > 1, "--num_nodes: each trial runs on one machine; start the sweep on each of them"),
    ):
        if is_set:
            raise plan.explain(UserError(words))


def _device(devices: str) -> str:
    """Say which one device a trial runs on."""
    named = [one for one in devices.split(",") if one.strip()]
    if devices == "auto":
        return "1"
    if len(named) == 1 and ("," in devices or named[0] == "1"):
        return devices
    raise UserError(f"--devices {devices}: each trial runs on one device; --workers starts several at once")
