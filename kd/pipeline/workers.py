"""How many processes load images where nobody says."""

import os


def default_workers(accelerator: str) -> int:
    """Choose from the cores that this process may use.

    A GPU leaves the cores to the loaders. On a CPU they are the training's own, and loaders pay where there are many.

    Args:
        accelerator: What trains, in Lightning's words.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // 4) if accelerator == "cpu" else min(8, cores)
