"""Ways to train that take turns, each turn in a process of its own: no other way lies in memory meanwhile."""

import multiprocessing as mp
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PATIENCE = 10.0

Taken = dict[str, list[float]]
"""The seconds of a step by way, round by round."""


class Way:
    """One way to train.

    Args:
        kind: ``plain``, ``limit``, ``torchdistill`` or ``ours``; the input alone, ``plain input`` and ``our input``; a
            tiny network, ``tiny`` and ``tiny by hand``.
        folder: Folder of class folders.
        image_size: Side of the views, in pixels.
        batch_size: Images in a batch.
        options: What else that way takes.
    """

    def __init__(self, kind: str, folder: Path, *, image_size: int, batch_size: int, **options: Any) -> None:
        self.given = (kind, str(folder), image_size, batch_size, options)
        self.peak_mb = 0.0

    def seconds(self, steps: int, *, warm_up: int) -> float:
        """Start a process, make steps in it to warm up and then those that count; return the seconds that one took."""
        context = mp.get_context("spawn")
        pipe, theirs = context.Pipe()
        # No daemon: that could have no processes that load images.
        process = context.Process(target=_work, args=(*self.given, theirs))
        process.start()
        theirs.close()
        try:
            for count in (warm_up, steps):
                pipe.send(count)
                seconds, peak_mb = pipe.recv()
            self.peak_mb = max(self.peak_mb, peak_mb)
            return float(seconds) / steps
        finally:
            pipe.close()
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def take_turns(ways: Mapping[str, Way], rounds: int, *, steps: Mapping[str, int], warm_up: Mapping[str, int]) -> Taken:
    """Let the ways take turns; return the seconds of a step by way, round by round."""
    taken: Taken = {name: [] for name in ways}
    for number in range(rounds):
        # Every second round backwards, so that none is always the one after the slowest.
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            taken[name].append(ways[name].seconds(steps[name], warm_up=warm_up[name]))
    return taken


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Return how many times as fast the other is: the median of the ratios by round, and their quartiles."""
    ratios = [first / second for first, second in zip(one, other, strict=True)]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def _work(kind: str, folder: str, image_size: int, batch_size: int, options: dict[str, Any], pipe: Any) -> None:  # noqa: ANN401
    """Train in a process of its own; after each step look whether there are more to make."""
    left, start = pipe.recv(), time.perf_counter()

    def after_step() -> None:
        nonlocal left, start
        left -= 1
        if left == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pipe.send((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
            try:
                left = pipe.recv()
            except EOFError:
                raise SystemExit from None
            start = time.perf_counter()

    sizes: dict[str, Any] = {"image_size": image_size, "batch_size": batch_size}
    from benchmarks import limit, ours, peer, plain

    if kind in ("tiny", "tiny by hand"):
        ours.tiny(after_step, by_hand=kind == "tiny by hand")
    if kind == "ours":
        ours.train(Path(folder), after_step=after_step, **sizes, **options)
    endless: dict[str, Callable[..., Any]] = {
        "plain": plain.steps,
        "limit": limit.steps,
        "torchdistill": peer.steps,
        "plain input": plain.batches,
        "our input": ours.batches,
    }
    for _ in endless[kind](Path(folder), **sizes, **options):
        after_step()
