"""One worker of a sweep: it determines the teacher, then runs trials until enough are finished."""

import math
import re
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from kd.console import make_console
from kd.errors import NotFiniteError, UserError
from kd.pipeline import find_teachers, run_experiment
from kd.report import summarize, write_summary
from kd.settings import Settings
from kd.sweep.plan import Plan
from kd.sweep.spaces import suggest
from kd.sweep.study import fail_lost_trials, has_heartbeat, open_study

REASON = "reason"
"""Attribute of a trial: why it stopped early."""
_TEACHERS = "teachers"
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_POLL_SECONDS = 1.0


class _SurplusTrial(Exception):  # noqa: N818 (not an error)
    """Two workers started a trial when a single one was left; that with the higher number is dropped."""


def prepare(plan: Plan, storage: str | None, console: Console) -> optuna.Study:
    """Check the settings of all trials, open the study, and let one worker train or find the teacher.

    Raises:
        UserError: If settings, storage or teacher are wrong.
    """
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

    A trial whose training diverges, or whose settings turn out to be impossible, is recorded as pruned with a reason:
    unlike Optuna's failed trials, pruned ones teach the sampler to avoid their region. A worker that isn't needed
    anymore waits for the others' trials, to retry one that is lost. A journal file has no heartbeats and so can't tell
    lost trials from running ones; there, nobody waits, and some trials more may be finished.

    Raises:
        UserError: If a trial meets an error that its settings didn't cause.
        Interrupted: After SIGTERM or SIGINT.
    """
    running = (TrialState.RUNNING,) if has_heartbeat(study) else ()

    def objective(trial: optuna.Trial) -> float:
        if running and _count(study, (*_FINISHED, *running, TrialState.WAITING), before=trial.number) >= plan.trials:
            raise _SurplusTrial
        for name, space in plan.spaces.items():
            suggest(trial, name, space)
        console.print(f"trial {trial.number} · started · {format_parameters(trial.params)}")
        try:
            return _distill(plan, study, trial)
        except UserError as error:
            if not _is_caused_by_settings(error, plan):
                raise plan.explain(error) from error
            trial.set_user_attr(REASON, f"failed: {error}")
            raise optuna.TrialPruned from error

    while _count(study, _FINISHED) < plan.trials:
        if _count(study, (*_FINISHED, *running)) >= plan.trials:
            time.sleep(_POLL_SECONDS)
            fail_lost_trials(study)
            continue
        try:
            study.optimize(
                objective, n_trials=1, catch=_SurplusTrial, callbacks=[partial(_print_result, console=console)]
            )
        except UpdateFinishedTrialError:
            console.print(f"No heartbeat for {plan.lost_after} s: this worker's trial was given to another one.")


def _print_result(_: optuna.Study, trial: FrozenTrial, *, console: Console) -> None:
    if trial.state in _FINISHED:
        result = trial.user_attrs.get(REASON, f"val acc {trial.value or 0:.3f}")
        console.print(f"trial {trial.number} · {result} · {format_parameters(trial.params)}")


def _count(study: optuna.Study, states: tuple[TrialState, ...], *, before: float = math.inf) -> int:
    """Return the number of trials in one of the states, of those before a trial's number."""
    return sum(trial.number < before for trial in study.get_trials(deepcopy=False, states=states))


def _distill(plan: Plan, study: optuna.Study, trial: optuna.Trial) -> float:
    """Distill with a trial's settings in the trial's folder; return the mean validation accuracy over the seeds."""
    folder = plan.folder / "trials" / str(trial.number)
    settings = trial_settings(plan, study, trial.params, folder)
    epochs = settings.optimization.max_epochs * settings.phases.seeds
    accuracies: list[float] = []

    def report(epoch: int, accuracy: float) -> None:
        # With several seeds the steps continue from one to the next.
        trial.report(accuracy, len(accuracies))
        accuracies.append(accuracy)
        # After the last epoch there is nothing to save.
        if len(accuracies) < epochs and trial.should_prune():
            trial.set_user_attr(REASON, f"pruned after epoch {epoch + 1} with val acc {accuracy:.3f}, below the median")
            raise optuna.TrialPruned

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        experiment = run_experiment(settings, console=make_console(file=log), on_epoch=report)
    write_summary(summarize(experiment.runs, data=experiment.data, folder=experiment.folder), experiment.folder)
    return statistics.fmean(run["val_acc"] for run in experiment.runs["distilled"])


def _is_caused_by_settings(error: UserError, plan: Plan) -> bool:
    """Return whether another trial may succeed: training diverged, memory ran out, or a searched flag is named."""
    is_out_of_memory = isinstance(error.__cause__, MemoryError | RuntimeError)
    flags = set(re.findall(r"--(\w+)", str(error)))
    return isinstance(error, NotFiniteError) or is_out_of_memory or bool(flags & plan.searched.keys())


def format_parameters(parameters: Mapping[str, Any]) -> str:
    """Return a trial's parameters in one line.

    Example:
        >>> format_parameters({"learning_rate": 0.0123456, "student_model": "simple"})
        'learning_rate 0.01235, student_model simple'
    """
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in parameters.items()
    )
