"""Several workers on one machine, each in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from kd.errors import UserError
from kd.sweep.plan import Plan

WORKER = "KD_SWEEP_WORKER"
"""Environment variable that tells a worker that another process prints and writes the results."""


def run_workers(plan: Plan, count: int, storage: str | None) -> None:
    """Start workers, which print their trials themselves, and wait until they end.

    Raises:
        UserError: If all workers failed.
        Interrupted: After SIGTERM or SIGINT; the workers are stopped, too.
    """
    command = [sys.executable, "-m", "kd", "sweep", str(plan.file), *(["--storage", storage] if storage else [])]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [share_of_machine(number, count, cores=cores, gpus=gpus.split(",")) for number in range(count)]
    processes = [subprocess.Popen(command, env=os.environ | share | {WORKER: "1"}) for share in shares]  # noqa: S603
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


def share_of_machine(number: int, count: int, *, cores: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that give one of several workers its share of the cores and one of the GPUs.

    Example:
        >>> share_of_machine(2, 3, cores=8, gpus=["0", "1"])
        {'OMP_NUM_THREADS': '2', 'CUDA_VISIBLE_DEVICES': '0'}
    """
    return {"OMP_NUM_THREADS": str(max(1, cores // count)), "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
