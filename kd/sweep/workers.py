"""Several workers on one machine, each a process of its own, and who looks after them."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from optuna.trial import TrialState
from rich.console import Console

from kd.errors import Interrupted, UserError
from kd.sweep import WORKER
from kd.sweep.plan import Plan
from kd.sweep.study import Study
from kd.sweep.work import ADVICE, prepare, shown
from kd.training import Interruption

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 30.0
"""How long a worker may take to end when it is asked to: to the end of its step."""


def work_together(plan: Plan, count: int, *, storage: str | None, console: Console) -> Study:
    """Start workers, and wait until all trials are finished.

    Args:
        plan: The sweep.
        count: How many.
        storage: The database's URL; ``None``: SQLite in the sweep's folder.
        console: Where to say what happens.

    Returns:
        The sweep's database, with all trials in it.

    Raises:
        UserError: If something is wrong, or no worker is left before all trials are finished.
        Interrupted: If it was asked to stop.
    """
    try:
        with Interruption().listening():
            # What is wrong is said once, and the teacher is trained before there are several to wait for it.
            study = prepare(plan, storage=storage, console=console)
            with contextlib.ExitStack() as stack:
                started = [
                    stack.enter_context(_started(plan, number, count, storage)) for number in range(1, count + 1)
                ]
                _follow(study, started, console)
    except Interrupted as stopped:
        raise Interrupted(str(stopped), received=stopped.received, advice=ADVICE) from stopped
    return study


def share_of_machine(number: int, count: int, *, cores: int, gpus: list[str]) -> dict[str, str]:
    """Return the environment variables that give a worker its share: its cores, and a GPU where there are some.

    Args:
        number: Which worker, from 1.
        count: How many there are.
        cores: Cores of the machine.
        gpus: The names of its GPUs.

    Example:
        >>> share_of_machine(3, 3, cores=8, gpus=["0", "1"])
        {'OMP_NUM_THREADS': '2', 'CUDA_VISIBLE_DEVICES': '0'}
    """
    share = {"OMP_NUM_THREADS": str(max(1, cores // count))}
    return share | ({"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)]} if gpus else {})


@contextlib.contextmanager
def _started(plan: Plan, number: int, count: int, storage: str | None) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a worker, and end it with the block."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = share_of_machine(number, count, cores=cores, gpus=[one for one in gpus.split(",") if one])
    line = [sys.executable, "-m", "kd", "sweep", str(plan.file)]
    if storage is not None:
        line += ["--storage", storage]
    with _log(plan, number).open("ab") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=os.environ | share | {WORKER: str(number)})  # noqa: S603 (this program)
        try:
            yield process
        finally:
            _end(process, log)


def _end(process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        log.write(b"It did not end when it was asked to.\n")
        process.kill()
        process.wait()


def _log(plan: Plan, number: int) -> Path:
    return plan.folder / f"worker-{number}.log"


def _follow(study: Study, workers: list["subprocess.Popen[bytes]"], console: Console) -> None:
    """Say which trials are finished, until all are."""
    told = {one.number for one in study.finished()}
    left: set[int] = set()
    while True:
        alive = {number for number, process in enumerate(workers, start=1) if process.poll() is None}
        for one in study.finished():
            if one.number not in told:
                told.add(one.number)
                came_to = f"{one.value:.2%}" if one.state == TrialState.COMPLETE and one.value is not None else "pruned"
                _say(console, f"Trial {one.number}: {came_to} ({shown(one.params)})")
        if not alive:
            break
        for number, process in enumerate(workers, start=1):
            if process.poll() and number not in left:
                left.add(number)
                _say(console, f"Worker {number} ended with status {process.returncode}: {_last_words(study, number)}")
        time.sleep(_LOOK_SECONDS)
    if len(study.finished()) < study.plan.trials:
        raise UserError(
            f"no worker is left, and {len(study.finished())} of {study.plan.trials} trials are finished; the last "
            f"words of the first: {_last_words(study, 1)}"
        )


def _last_words(study: Study, number: int) -> str:
    path = _log(study.plan, number)
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'none'} ({path})"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
