"""The search for hyperparameters: many distillations from one teacher, by any number of workers."""

import importlib.util
import os
from pathlib import Path

from rich.console import Console

from kd.errors import UserError
from kd.sweep.plan import Plan, read_plan

WORKER = "KD_SWEEP_WORKER"
"""The variable by which a worker knows that another process speaks for it."""


def run_sweep(file: Path, *, storage: str | None = None, workers: int = 1, console: Console | None = None) -> None:
    """Run the trials of a sweep until all are finished, and leave its table and its files.

    Args:
        file: The sweep's YAML file, see :mod:`kd.sweep.plan`.
        storage: URL of the database that the workers share; ``None``: SQLite in the sweep's folder.
        workers: How many processes to start.
        console: Where to say what happens.

    Raises:
        UserError: If something in the file, or with the database, is wrong.
        Interrupted: If it was asked to stop.
    """
    if workers < 1:
        raise UserError(f"--workers must be at least 1, and is {workers}")
    plan = read_plan(file)
    if importlib.util.find_spec("optuna") is None:
        raise UserError("kd sweep takes Optuna: pip install '.[sweep]', or uv run --extra sweep kd sweep ...")
    console = console or Console()

    # Nothing heavy is imported before the file is known to be right.
    from kd.sweep.results import write_results
    from kd.sweep.work import work
    from kd.sweep.workers import work_together

    if workers > 1:
        study = work_together(plan, workers, storage=storage, console=console)
    else:
        study = work(plan, storage=storage, console=console)
    if WORKER not in os.environ:
        write_results(study, console)


__all__ = ["WORKER", "Plan", "read_plan", "run_sweep"]
