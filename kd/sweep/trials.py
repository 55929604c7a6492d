"""One worker of a sweep: it determines the teacher, then runs trials until enough are finished."""

import itertools
import math
import re
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages._heartbeat import is_heartbeat_enabled
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from kd.console import make_console
from kd.errors import NotFiniteError, UserError
from kd.pipeline import find_teachers, run_experiment
from kd.report import summarize, write_summary
from kd.settings import Settings
from kd.sweep.plan import Plan
from kd.sweep.study import open_study, redacted

# Attribute of a trial: why it stopped early.
REASON = "reason"
METRIC = "metric"
"""Attribute of a finished trial: the metric that its value is."""
_TEACHERS = "teachers"
_MAX_FAILED = 3
_RETRIES, _RETRY_SECONDS = 20, 6.0
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class _SurplusTrial(Exception):  # noqa: N818 (not an error)
    """Two workers started a trial when only one was left; the one with the higher number is dropped."""


_PASSED_ON = (_SurplusTrial, optuna.TrialPruned, OptunaError, SQLAlchemyError, OSError)
"""What isn't the result of a trial."""


def prepare(plan: Plan, storage: str | None, console: Console) -> optuna.Study:
    """Check the settings of all trials, open the study, and let one worker train or find the teacher."""
    quiet = Console(quiet=True)
    for number, parameters in enumerate(plan.examples()):
        try:
            find_teachers(plan.settings(parameters), console=quiet if number else console)
        except UserError as error:
            raise plan.explain(error) from error
    lock = FileLock(plan.folder / "sweep.lock")
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        console.print("Waiting for another worker, which is preparing the teacher.")
        lock.acquire()
    except OSError as error:
        raise UserError(f"--default_root_dir {plan.folder.parent}: can't write to this folder: {error}") from None
    try:
        study = open_study(plan, storage)
        if _TEACHERS not in study.user_attrs:
            study.set_user_attr(_TEACHERS, _train_or_find_teacher(plan, console))
    finally:
        lock.release()
    return study


def _train_or_find_teacher(plan: Plan, console: Console) -> list[str]:
    """Return the teacher's checkpoints, relative to the sweep's folder if they lie in it, so that it can be moved."""
    place: dict[str, Any] = {"name": plan.folder.name, "default_root_dir": str(plan.folder.parent)}
    if plan.resolved.settings.phases.train_teacher:
        run_experiment(plan.settings(distill=False, resume="auto", **place), console=console)
    checkpoints = find_teachers(plan.settings(train_teacher=False, **place), console=Console(quiet=True))
    home, paths = plan.folder.resolve(), [Path(checkpoint).resolve() for checkpoint in checkpoints]
    return [str(path.relative_to(home) if path.is_relative_to(home) else path) for path in paths]


def trial_settings(plan: Plan, study: optuna.Study, parameters: Mapping[str, Any], folder: Path) -> Settings:
    """Return the settings of an experiment in a folder that distills from the sweep's teacher."""
    return plan.settings(
        parameters,
        default_root_dir=str(folder.parent),
        name=folder.name,
        train_teacher=False,
        teacher_checkpoint=[str(plan.folder / path) for path in study.user_attrs[_TEACHERS]],
    )


def run_trials(plan: Plan, study: optuna.Study, console: Console) -> None:
    """Run trials beside any number of other workers, until just as many as planned are finished.

    A trial whose training diverges, or whose settings are impossible, is recorded as pruned with a reason: unlike
    Optuna's failed trials, pruned ones make the sampler avoid their region. An idle worker waits for the others, to
    retry a lost trial. A journal file has no heartbeats, so that lost and running trials can't be distinguished: there,
    no worker waits, and a few more trials may be finished.
    """
    has_heartbeat = is_heartbeat_enabled(study._storage)  # noqa: SLF001 (there is no public way)
    running = (TrialState.RUNNING,) if has_heartbeat else ()

    def objective(trial: optuna.Trial) -> float:
        if running and _count(study, (*_FINISHED, *running, TrialState.WAITING), before=trial.number) >= plan.trials:
            raise _SurplusTrial
        draw_parameters(trial, plan.spaces)
        console.print(f"trial {trial.number} · started · {_format_parameters(trial.params)}")
        return _try(plan, study, trial)

    def print_result(_: optuna.Study, trial: FrozenTrial) -> None:
        if trial.state in _FINISHED:
            result = trial.user_attrs.get(REASON, f"val acc {trial.value or 0:.3f}")
            console.print(f"trial {trial.number} · {result} · {_format_parameters(trial.params)}")

    def run_next() -> bool:
        """Run a trial, or wait for other workers; return whether more are wanted."""
        if _count(study, _FINISHED) >= plan.trials:
            return False
        if _count(study, (*_FINISHED, *running)) >= plan.trials:
            time.sleep(1.0)
            # Adds the trials of workers without a heartbeat again, to be retried.
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                optuna.storages.fail_stale_trials(study)
            return True
        try:
            study.optimize(objective, n_trials=1, catch=_SurplusTrial, callbacks=[print_result])
        except UpdateFinishedTrialError:
            console.print(f"No heartbeat for {plan.lost_after} s: this worker's trial was given to another one.")
        return True

    while _patiently(run_next, console):
        pass


def _patiently(run: Callable[[], bool], console: Console) -> bool:
    """Call a function again while the database can't be reached: it is restarted, or locked for long.

    An unfinished trial is retried, as it has no heartbeat.

    Raises:
        UserError: If that lasts for two minutes.
    """
    for attempt in itertools.count(1):
        try:
            return run()
        except (StorageInternalError, SQLAlchemyError) as error:
            reason = redacted(str(error.__cause__ or error).splitlines()[0])
            if attempt > _RETRIES:
                raise UserError(f"kd sweep: the database can't be reached: {reason}") from error
            console.print(f"The database can't be reached ({reason}); trying again in {_RETRY_SECONDS:.0f} s.")
            time.sleep(_RETRY_SECONDS)
    return False


def _try(plan: Plan, study: optuna.Study, trial: optuna.Trial) -> float:
    """Return the result of a trial; one that can't be trained is pruned, with the reason."""
    try:
        return _distill(plan, study, trial)
    except _PASSED_ON:
        raise
    except UserError as error:
        if not _is_caused_by_settings(error, plan):
            raise plan.explain(error) from error
        trial.set_user_attr(REASON, f"failed: {error}")
        raise optuna.TrialPruned from error
    except Exception as error:
        # Such as one of the user's own network; what fails in every trial ends the sweep.
        reasons = [str(each.user_attrs.get(REASON, "")) for each in study.get_trials(deepcopy=False)]
        failed = sum(reason.startswith("failed") for reason in reasons)
        if failed >= _MAX_FAILED and not _count(study, (TrialState.COMPLETE,)):
            raise
        (plan.folder / "trials" / str(trial.number) / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        trial.set_user_attr(REASON, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        raise optuna.TrialPruned from error


def draw_parameters(trial: optuna.Trial, spaces: Mapping[str, BaseDistribution]) -> None:
    """Draw a trial's parameters."""
    for name, space in spaces.items():
        if isinstance(space, CategoricalDistribution):
            trial.suggest_categorical(name, space.choices)
        elif isinstance(space, FloatDistribution):
            trial.suggest_float(name, **vars(space))
        else:
            trial.suggest_int(name, **vars(space))


def _count(study: optuna.Study, states: tuple[TrialState, ...], *, before: float = math.inf) -> int:
    """Return the number of trials in one of the states, with a number below ``before``."""
    return sum(trial.number < before for trial in study.get_trials(deepcopy=False, states=states))


def _distill(plan: Plan, study: optuna.Study, trial: optuna.Trial) -> float:
    """Distill with a trial's settings in the trial's folder; return the mean validation accuracy over the seeds."""
    folder = plan.folder / "trials" / str(trial.number)
    settings = trial_settings(plan, study, trial.params, folder)
    epochs = settings.optimization.max_epochs * settings.phases.seeds
    accuracies: list[float] = []

    def report(epoch: int, accuracy: float) -> None:
        # With several seeds the steps continue from one to the next. Trials of different lengths are compared at the
        # same thousandth of their training, where both have an epoch: at the same epoch, the shorter one is ahead.
        step = len(accuracies)
        trial.report(accuracy, round(1000 * (step + 1) / epochs) if "max_epochs" in plan.spaces else step)
        accuracies.append(accuracy)
        # After the last epoch there is nothing to save.
        if len(accuracies) < epochs and trial.should_prune():
            trial.set_user_attr(REASON, f"pruned after epoch {epoch + 1} with val acc {accuracy:.3f}, below the median")
            raise optuna.TrialPruned

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        experiment = run_experiment(settings, console=make_console(file=log), on_epoch=report)
    write_summary(summarize(experiment.runs, data=experiment.data, folder=experiment.folder), experiment.folder)
    trial.set_user_attr(METRIC, experiment.runs["distilled"][0]["metric"])
    return statistics.fmean(run["score"] for run in experiment.runs["distilled"])


def _is_caused_by_settings(error: UserError, plan: Plan) -> bool:
    """Return whether another trial may succeed: training diverged, memory ran out, or a searched flag is named."""
    is_out_of_memory = isinstance(error.__cause__, MemoryError | RuntimeError)
    flags = set(re.findall(r"--(\w+)", str(error)))
    return isinstance(error, NotFiniteError) or is_out_of_memory or bool(flags & plan.searched.keys())


def _format_parameters(parameters: Mapping[str, Any]) -> str:
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in parameters.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())
