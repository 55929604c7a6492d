"""Training methods, measured alternately, each in its own process."""

import multiprocessing as mp
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.plain import Task

_EXIT_TIMEOUT_SECONDS = 10.0

Timings = dict[str, list[float]]
"""Seconds per step in each round, by method."""


class Method:
    """A training method.

    Args:
        kind: ``plain``, ``limit``, ``torchdistill`` or ``kd``; for the input pipeline ``plain input`` and ``kd input``;
            for a tiny network ``tiny`` and ``tiny by hand``, which ignore the task.
        task: Images and networks.
        options: Additional arguments of the method.
    """

    def __init__(self, kind: str, task: Task, **options: Any) -> None:
        self.kind, self.task, self.options = kind, task, options
        self.peak_mb = 0.0

    def seconds(self, steps: int, *, warm_up: int) -> float:
        """Run warm-up steps and then timed steps in a new process; return the seconds per timed step."""
        context = mp.get_context("spawn")
        pipe, worker_end = context.Pipe()
        # Not a daemon, which could not start data-loading workers.
        process = context.Process(target=_work, args=(self.kind, self.task, self.options, worker_end))
        process.start()
        worker_end.close()
        try:
            for count in (warm_up, steps):
                pipe.send(count)
                seconds, peak_mb = pipe.recv()
            self.peak_mb = max(self.peak_mb, peak_mb)
            return float(seconds) / steps
        finally:
            pipe.close()
            process.join(_EXIT_TIMEOUT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def measure_alternately(
    methods: Mapping[str, Method], rounds: int, *, steps: Mapping[str, int], warm_up: Mapping[str, int]
) -> Timings:
    """Measure the methods in turn, so that other load on the machine affects all equally."""
    timings: Timings = {name: [] for name in methods}
    for round_index in range(rounds):
        # Alternate the direction, so that no method always follows the slowest.
        for name in list(methods)[:: -1 if round_index % 2 else 1]:
            timings[name].append(methods[name].seconds(steps[name], warm_up=warm_up[name]))
    return timings


def speedup(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratios ``slow / fast`` within each round."""
    ratios = [first / second for first, second in zip(slow, fast, strict=True)]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def _work(kind: str, task: Task, options: dict[str, Any], pipe: Any) -> None:  # noqa: ANN401
    """Train in the worker process; send duration and peak memory after each requested number of steps."""
    remaining, start = pipe.recv(), time.perf_counter()

    def after_step() -> None:
        nonlocal remaining, start
        remaining -= 1
        if remaining == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pipe.send((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
            try:
                remaining = pipe.recv()
            except EOFError:
                raise SystemExit from None
            start = time.perf_counter()

    from benchmarks import framework, limit, peer, plain

    if kind in ("tiny", "tiny by hand"):
        framework.tiny(after_step, by_hand=kind == "tiny by hand")
    if kind == "kd":
        framework.train(task, after_step, **options)
    endless: dict[str, Callable[..., Any]] = {
        "plain": plain.steps,
        "limit": limit.steps,
        "torchdistill": peer.steps,
        "plain input": plain.batches,
        "kd input": framework.batches,
    }
    for _ in endless[kind](task, **options):
        after_step()
