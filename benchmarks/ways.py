"""Ways to train that take turns, each in a process of its own."""

import multiprocessing as mp
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Way:
    """One way to train, in a process of its own, that makes steps when it is told to.

    Args:
        kind: ``plain``, ``limit`` or ``ours``, or the input alone, ``plain input`` and ``our input``.
        folder: Folder of class folders.
        image_size: Side of the views, in pixels.
        batch_size: Images in a batch.
        options: What else that way takes.
    """

    def __init__(self, kind: str, folder: Path, *, image_size: int, batch_size: int, **options: Any) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        given = (kind, str(folder), image_size, batch_size, options, theirs)
        self.process = context.Process(target=_work, args=given, daemon=True)
        self.process.start()
        self.peak_mb = 0.0

    def seconds(self, steps: int) -> float:
        """Make steps, and return the seconds that one took."""
        self.pipe.send(steps)
        seconds, self.peak_mb = self.pipe.recv()
        return float(seconds) / steps

    def end(self) -> None:
        """Stop the process."""
        self.process.kill()
        self.process.join()


def _work(kind: str, folder: str, image_size: int, batch_size: int, options: dict[str, Any], pipe: Any) -> None:  # noqa: ANN401
    """Train in a process of its own; after each step look whether there are more to make."""
    left, start = pipe.recv(), time.perf_counter()

    def after_step() -> None:
        nonlocal left, start
        left -= 1
        if left == 0:
            pipe.send((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
            left, start = pipe.recv(), time.perf_counter()

    sizes: dict[str, Any] = {"image_size": image_size, "batch_size": batch_size}
    from benchmarks import limit, ours, plain

    if kind == "ours":
        ours.train(Path(folder), after_step=after_step, **sizes, **options)
    endless: dict[str, Callable[..., Any]] = {
        "plain": plain.steps,
        "limit": limit.steps,
        "plain input": plain.batches,
        "our input": ours.batches,
    }
    for _ in endless[kind](Path(folder), **sizes, **options):
        after_step()
