import os

import pytest

from kd.pipeline.components import default_workers


@pytest.mark.parametrize(
    ("accelerator", "cores", "workers"), [("cpu", 2, 0), ("cpu", 8, 2), ("cpu", 64, 8), ("gpu", 2, 2), ("gpu", 64, 8)]
)
def test_the_number_of_workers_depends_on_the_cores(
    accelerator: str, cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert default_workers(accelerator) == workers
