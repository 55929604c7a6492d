"""Hyperparameter search with Optuna: many distillations from one teacher, by any number of workers."""

import importlib.util
import os
from pathlib import Path

from rich.console import Console

from kd.console import make_console
from kd.errors import Interrupted, UserError


def run_sweep(file: Path, *, storage: str | None = None, workers: int = 1, console: Console | None = None) -> None:
    """Run the trials of a sweep until enough are finished, then print its table and write its files.

    Args:
        file: The sweep's YAML file, see :mod:`kd.sweep.plan`.
        storage: URL of a database that the workers share, or path of a journal file; ``None``: SQLite in the sweep's
            folder.
        workers: Number of processes to start; each runs one trial at a time.
        console: Where to print.

    Raises:
        UserError: If something in the file, or the storage, is wrong.
        Interrupted: After SIGTERM or SIGINT.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if importlib.util.find_spec("optuna") is None:
        raise UserError("kd sweep needs Optuna: pip install '.[sweep]', or uv run --extra sweep kd sweep ...")
    console = console or make_console()

    # The file is validated before torch is imported.
    from kd.sweep.plan import read_plan

    plan = read_plan(file)

    from kd.sweep.results import write_results
    from kd.sweep.trials import prepare, run_trials
    from kd.sweep.workers import WORKER, run_workers
    from kd.training import Interruption

    is_worker = WORKER in os.environ
    try:
        with Interruption().listening():
            study = prepare(plan, storage, Console(quiet=True) if is_worker else console)
            if workers > 1:
                run_workers(plan, workers, storage)
            else:
                run_trials(plan, study, console)
    except Interrupted as stopped:
        advice = "The same command resumes the sweep; another trial replaces the interrupted one."
        raise Interrupted(str(stopped), received=stopped.received, advice=advice) from stopped
    if not is_worker:
        write_results(plan, study, console)
