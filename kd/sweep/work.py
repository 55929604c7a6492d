"""What one worker of a sweep does: settle the teacher, then run trials until all are finished."""

import gc
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from rich.console import Console

from kd.errors import Interrupted, NotFiniteError, UserError
from kd.pipeline import Experiment, find_teachers, run_experiment
from kd.report import summarize, write_summary
from kd.sweep.plan import Plan
from kd.sweep.study import Pulse, Study
from kd.training import Interruption

TRIALS = "trials"
_LOCK = "sweep.lock"
_LOG = "log.txt"
ADVICE = "The same command goes on with the sweep; this trial is begun anew."
# What Optuna keeps of a trial besides its parameters.
VALUES, NOTE, FOLDER, BEST = "values", "note", "folder", "best_val_acc"


def work(plan: Plan, *, storage: str | None, console: Console) -> Study:
    """Run trials until all are finished, beside any number of other workers.

    Args:
        plan: The sweep.
        storage: The database's URL; ``None``: SQLite in the sweep's folder.
        console: Where to say what happens.

    Returns:
        The sweep's database, with all trials in it.

    Raises:
        UserError: If something is wrong: with the settings before anything runs.
        Interrupted: If it was asked to stop.
    """
    try:
        with Interruption().listening():
            study = prepare(plan, storage=storage, console=console)
            while (trial := study.next_trial()) is not None:
                _run(trial, study, console)
                # A trainer and its networks refer to one another, and hold a device's memory.
                gc.collect()
    except Interrupted as stopped:
        raise Interrupted(str(stopped), received=stopped.received, advice=ADVICE) from stopped
    return study


def prepare(plan: Plan, *, storage: str | None, console: Console) -> Study:
    """Look at what can be wrong, open the database, and settle the teacher: it is trained or found by one worker.

    Args:
        plan: The sweep.
        storage: The database's URL, or ``None``.
        console: Where to say what happens.

    Raises:
        UserError: If something is wrong.
    """
    _check(plan, console)
    with locked(plan, console):
        study = Study(plan, storage=storage, say=lambda text: _say(console, text))
        if not study.teachers:
            study.teachers = _teachers(plan, console)
    return study


class locked:  # noqa: N801 (it is used like a function)
    """Lets one worker of a machine, or of machines with one file system, into a ``with`` block at a time.

    Args:
        plan: The sweep.
        console: Where to say that it waits.
    """

    def __init__(self, plan: Plan, console: Console) -> None:
        self._folder = plan.folder
        self._console = console
        self._lock = FileLock(plan.folder / _LOCK)

    def __enter__(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--default_root_dir {self._folder.parent}: nothing can be written there: {error}"
            ) from None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            _say(self._console, "Waiting for another worker, which makes things ready.")
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _check(plan: Plan, console: Console) -> None:
    """Look at the first value of everything, and at each choice beside the first of the others."""
    silent = Console(quiet=True)
    examples = {name: space.examples() for name, space in plan.spaces.items()}
    first = {name: some[0] for name, some in examples.items()}
    tried = [first, *(first | {name: one} for name, some in examples.items() for one in some[1:])]
    for number, values in enumerate(tried):
        try:
            find_teachers(plan.settings(values), console=silent if number else console)
        except UserError as error:
            raise plan.explain(error) from error


def _teachers(plan: Plan, console: Console) -> tuple[str, ...]:
    """Train the teacher where that is asked for and it is not there, and name its checkpoints."""
    place: dict[str, Any] = {"name": plan.name, "default_root_dir": str(plan.root)}
    if plan.trains_teacher:
        run_experiment(plan.settings(distill=False, resume="auto", **place), console=console)
    return find_teachers(plan.settings(train_teacher=False, **place), console=Console(quiet=True))


def _run(trial: optuna.Trial, study: Study, console: Console) -> None:
    """Run a trial, and write down how it ended."""
    plan, number = study.plan, trial.number
    state, accuracy, words = TrialState.FAIL, None, "failed"
    with Pulse(trial, lost_after=plan.lost_after):
        try:
            values = {name: space.suggest(trial, name) for name, space in plan.spaces.items()}
            trial.set_user_attr(VALUES, values)
            _say(console, f"Trial {number}: {shown(trial.params)}")
            done = _distill(values, trial, study)
            state, accuracy = TrialState.COMPLETE, statistics.fmean(run["val_acc"] for run in done.runs["distilled"])
            words = f"{accuracy:.2%}"
        except optuna.TrialPruned as pruned:
            state, words = TrialState.PRUNED, f"pruned: {pruned}"
        except NotFiniteError as error:
            # The search learns from it that this was no good.
            state, words = TrialState.PRUNED, f"pruned: {str(error).partition('; ')[0]}"
        except UpdateFinishedTrialError:
            words = "given up"
        except UserError as error:
            raise UserError(f"trial {number} ({shown(trial.params)}): {plan.explain(error)}") from error
        finally:
            counts = study.tell(trial, state, accuracy)
    if not counts:
        words = f"{words}, and it does not count: another worker took it for lost"
    _say(console, f"Trial {number}: {words}")


def _distill(values: Mapping[str, Any], trial: optuna.Trial, study: Study) -> Experiment:
    """Distill with the values that a trial draws, in a folder of its own."""
    plan, number = study.plan, str(trial.number)
    home = plan.folder / TRIALS
    settings = plan.settings(
        values,
        default_root_dir=str(home),
        name=number,
        train_teacher=False,
        teacher_checkpoint=list(study.teachers),
    )
    last = settings.optimization.max_epochs * settings.phases.seeds - 1
    reported = 0

    def report(epoch: int, accuracy: float) -> None:
        nonlocal reported
        # Of several seeds the second goes on where the first ended.
        step, reported = reported, reported + 1
        trial.report(accuracy, step)
        # After the last epoch there is nothing to spare.
        if step < last and trial.should_prune():
            raise optuna.TrialPruned(f"{accuracy:.2%} after epoch {epoch + 1} is below the median")

    (home / number).mkdir(parents=True, exist_ok=True)
    trial.set_user_attr(FOLDER, f"{TRIALS}/{number}")
    with Path(home / number / _LOG).open("a", encoding="utf-8") as log:
        done = run_experiment(settings, console=Console(file=log, width=120), on_epoch=report)
    trial.set_user_attr(BEST, statistics.fmean(run["best_val_acc"] for run in done.runs["distilled"]))
    write_summary(summarize(done.runs, data=done.data, folder=done.folder), done.folder)
    return done


def shown(parameters: Mapping[str, Any]) -> str:
    """Write what a trial draws in one line.

    Example:
        >>> shown({"learning_rate": 0.0123456, "student_model": "simple"})
        'learning_rate 0.01235, student_model simple'
    """
    return ", ".join(f"{name} {value_shown(value)}" for name, value in parameters.items())


def value_shown(value: object) -> str:
    """Write a value with as many digits as a person reads."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
