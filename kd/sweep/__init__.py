"""Hyperparameter search with Optuna: many distillations from one teacher, by any number of workers."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kd.console import make_console
from kd.errors import Interrupted, UserError

# Environment variable of a worker whose results another process prints and writes.
_WORKER = "KD_SWEEP_WORKER"
_STORAGE = "KD_SWEEP_STORAGE"
"""Environment variable of the storage's URL, which may hold a password."""


def run_sweep(file: Path, *, storage: str | None = None, workers: int = 1, console: Console | None = None) -> None:
    """Run the trials of a sweep until enough are finished, then print its table and write its files.

    Args:
        file: The sweep's YAML file, see :mod:`kd.sweep.plan`.
        storage: URL of a database that the workers share, or path of a journal file; by default that in the
            environment variable KD_SWEEP_STORAGE, or SQLite in the sweep's folder.
        workers: Number of processes to start; each runs one trial at a time.
        console: Where to print.
    """
    storage = storage or os.environ.get(_STORAGE)
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
    from kd.training import Interruption

    is_worker = _WORKER in os.environ
    try:
        with Interruption().listening():
            study = prepare(plan, storage, Console(quiet=True) if is_worker else console)
            if workers > 1:
                _run_workers(workers, str(file), storage)
            else:
                run_trials(plan, study, console)
    except Interrupted as stopped:
        advice = "The same command resumes the sweep; another trial replaces the interrupted one."
        raise Interrupted(str(stopped), received=stopped.received, advice=advice) from stopped
    if not is_worker:
        write_results(plan, study, console)


def _run_workers(count: int, file: str, storage: str | None) -> None:
    """Start worker processes, which print their trials themselves, and wait until they end."""
    import torch

    command = [sys.executable, "-m", "kd", "sweep", file]
    # Other users of the machine see the arguments of a process, but not its environment.
    shared = {_WORKER: "1"} | ({} if storage is None else {_STORAGE: storage})
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [_share_of_machine(number, count, cores=cores, gpus=gpus.split(",")) for number in range(count)]
    processes = [subprocess.Popen(command, env=os.environ | share | shared) for share in shares]  # noqa: S603
    try:
        for process in processes:
            process.wait()
        if all(process.returncode for process in processes):
            raise UserError(f"--workers {count}: every worker failed; see their messages above")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _share_of_machine(number: int, count: int, *, cores: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that give one of several workers its share of the cores and one of the GPUs.

    Example:
        >>> _share_of_machine(2, 3, cores=8, gpus=["0", "1"])
        {'OMP_NUM_THREADS': '2', 'CUDA_VISIBLE_DEVICES': '0'}
    """
    return {"OMP_NUM_THREADS": str(max(1, cores // count)), "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
