"""The database that the workers of a sweep share, and how they agree on which trial is whose.

No worker is above the others. Each asks for a trial, and asks again until ``trials`` of them are finished:

- One that would be too many is given up before it runs. A trial is too many if those that are finished, and those
  with a lower number that are running, are enough. Numbers are given out one after another, so however many ask at
  once, the trial with the highest number of all that were finished has counted all the others.
- A worker gives a sign of life every few seconds. The others look at it between their trials, and while they wait for
  the last ones: a trial without one for ``lost_after`` seconds, by the observer's own clock, has failed, and another
  one takes its place. (Optuna's own heartbeat never notices a trial whose worker died before its first beat.)
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from kd.errors import UserError
from kd.randomness import derive_seed
from kd.sweep.plan import Plan

DATABASE = "sweep.db"
SURPLUS = "surplus"
_PULSE, _DEFINITION, _TEACHER = "pulse", "definition", "teacher"
_BEATS = 6
"""Signs of life in the time after which a trial is lost."""
_PATIENCE = 60
"""Seconds that a worker waits for another's write to SQLite."""
_ATTEMPTS = 5
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Study:
    """A sweep's trials, in its database.

    Args:
        plan: The sweep.
        storage: The database's URL; ``None``: SQLite in the sweep's folder.
        say: Tells a person what happens.

    Raises:
        UserError: If the database can't be opened, or holds a sweep of this name that searches something else.
    """

    def __init__(self, plan: Plan, *, storage: str | None = None, say: Callable[[str], object] = print) -> None:
        self.plan = plan
        self.say = say
        self._watch = Watch(plan.lost_after)
        self._study = _opened(plan, storage)
        self._agree()

    @property
    def teachers(self) -> tuple[str, ...]:
        """The checkpoints that all trials learn from; none where that is yet to be settled.

        Raises:
            UserError: If they are not on this machine.
        """
        paths = [self.plan.folder / one for one in self._study.user_attrs.get(_TEACHER, [])]
        for path in paths:
            if not path.is_file():
                raise UserError(
                    f"the sweep's teacher is not here: {path}; machines that share a sweep share --default_root_dir"
                )
        return tuple(map(str, paths))

    @teachers.setter
    def teachers(self, checkpoints: Iterable[str]) -> None:
        home = self.plan.folder.resolve()
        paths = [Path(one).resolve() for one in checkpoints]
        # Those in the sweep's folder by their place in it: it may be moved.
        told = [str(path.relative_to(home)) if path.is_relative_to(home) else str(path) for path in paths]
        self._study.set_user_attr(_TEACHER, told)

    def next_trial(self) -> optuna.Trial | None:
        """Return a trial to run, or ``None`` when all are finished; wait while others run the last ones."""
        waits = False
        while True:
            running = self._running()
            finished = len(self.finished())
            if finished >= self.plan.trials:
                return None
            if finished + len(running) < self.plan.trials:
                trial = self._asked()
                if trial is not None:
                    return trial
            elif not waits:
                waits = True
                numbers = ", ".join(str(one.number) for one in running)
                self.say(f"Waiting for trials of other workers: {numbers}")
            time.sleep(min(1.0, self.plan.lost_after / 10))

    def finished(self) -> list[FrozenTrial]:
        """Return the trials that count."""
        return self._study.get_trials(deepcopy=False, states=_FINISHED)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials but those that were too many."""
        return [one for one in self._study.get_trials(deepcopy=False) if SURPLUS not in one.user_attrs]

    def tell(self, trial: optuna.Trial, state: TrialState, accuracy: float | None = None) -> bool:
        """Write down how a trial ended.

        Returns:
            Whether it counts: not if another worker took it for lost in the meantime.
        """
        self._study.tell(trial, accuracy, state=state, skip_if_finished=True)
        return self._study.get_trials(deepcopy=False)[trial.number].state == state

    def _asked(self) -> optuna.Trial | None:
        trial = self._study.ask()
        before = [one for one in self._study.get_trials(deepcopy=False) if one.number < trial.number]
        running = [one for one in before if one.state == TrialState.RUNNING]
        if len(self.finished()) + len(running) >= self.plan.trials:
            trial.set_user_attr(SURPLUS, True)
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            return None
        # What a trial draws hangs on its number, whichever worker runs it, and whatever was cut off before.
        self._study.sampler = _sampler(derive_seed(self.plan.sampler_seed, trial.number))
        return trial

    def _running(self) -> list[FrozenTrial]:
        """Return the trials that are running, and fail those that are lost."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        lost = self._watch.lost({one.number: one.user_attrs.get(_PULSE) for one in running}, now=time.monotonic())
        for number in lost:
            self.say(f"Trial {number}: lost, as its worker gave no sign of life for {self.plan.lost_after:g} s")
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        return [one for one in running if one.number not in lost]

    def _agree(self) -> None:
        """Refuse to go on with a sweep that searches something else."""
        wanted = self.plan.definition()
        known: dict[str, Any] | None = self._study.user_attrs.get(_DEFINITION)
        if known is None:
            self._study.set_user_attr(_DEFINITION, wanted)
            known = wanted
        changed = sorted(name for name in known.keys() | wanted.keys() if known.get(name) != wanted.get(name))
        if changed:
            first = changed[0]
            how = f"{first} was {known.get(first)} and is now {wanted.get(first)}"
            others = f" (and {', '.join(changed[1:])})" if changed[1:] else ""
            raise UserError(
                f"{self.plan.file}: the sweep {self.plan.name} was begun with other settings: {how}{others}; change it "
                "back, or give this one another --name"
            )


class Watch:
    """Knows since when each trial has given no sign of life, by this process's own clock.

    Args:
        seconds: After how many it is lost.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._seen: dict[int, tuple[int | None, float]] = {}

    def lost(self, pulses: dict[int, int | None], *, now: float) -> set[int]:
        """Return the trials that are lost.

        Args:
            pulses: The last sign of life of each trial that runs, by its number.
            now: The time, in seconds.
        """
        for number, pulse in pulses.items():
            if number not in self._seen or self._seen[number][0] != pulse:
                self._seen[number] = (pulse, now)
        return {number for number in pulses if now - self._seen[number][1] > self.seconds}


class Pulse:
    """Gives signs of life for a trial inside a ``with`` block, from a thread of its own.

    Args:
        trial: The trial.
        lost_after: Seconds without one after which it is lost.
    """

    def __init__(self, trial: optuna.Trial, *, lost_after: float) -> None:
        self._trial = trial
        self._seconds = lost_after / _BEATS
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        self._thread.join()

    def _beat(self) -> None:
        beats = 0
        while True:
            beats += 1
            try:
                self._trial.set_user_attr(_PULSE, beats)
            except UpdateFinishedTrialError:
                # It was taken for lost: the worker will see when it tells how it ended.
                return
            except StorageInternalError:
                # The database is busy, or away for a moment.
                pass
            if self._ends.wait(self._seconds):
                return


def _opened(plan: Plan, url: str | None) -> optuna.Study:
    place = f"sqlite:///{(plan.folder / DATABASE).resolve()}" if url is None else url
    options = {"connect_args": {"timeout": _PATIENCE}} if place.startswith("sqlite") else {}
    shown = str(plan.folder / DATABASE) if url is None else f"--storage {_without_password(url)}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return optuna.create_study(
                study_name=plan.name,
                storage=optuna.storages.RDBStorage(place, engine_kwargs=options),
                direction="maximize",
                load_if_exists=True,
                sampler=_sampler(plan.sampler_seed),
                pruner=optuna.pruners.MedianPruner() if plan.prune else optuna.pruners.NopPruner(),
            )
        except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.IntegrityError, StorageInternalError) as error:
            # Two workers that begin at once both make the tables, and one of them is told that they are there.
            if attempt == _ATTEMPTS:
                raise UserError(f"{shown}: this database can't be opened: {str(error).splitlines()[0]}") from None
            time.sleep(attempt / 4)
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
            raise UserError(f"{shown}: this database can't be opened: {str(error).splitlines()[0]}") from None
    raise AssertionError


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # Before Optuna 5 the liar, which keeps workers from trying the same at once, was an experiment.
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)


def _without_password(url: str) -> str:
    before, at, after = url.rpartition("@")
    user = before.partition("://")[0] if at else ""
    return f"{user}://...@{after}" if at else url
