"""Several processes make one run: as one process would, counted once, written once, and ended together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.data import read_splits, write_shards
from tests.conftest import MakeFolder

# Without batch normalization, whose means are those of each process's own images; 1,437 images, an odd number.
DIGITS = (
    "--dataset digits --image_size 8 --teacher_model mlp --student_model linear --learning_rate 0.01 --accelerator cpu"
)
# Runs trainings one after the other, each by forked processes, as importing the program anew for each takes long.
STAGES = """import json, os, signal, sys
from lightning_utilities.core.rank_zero import rank_zero_only
from kd.cli import experiment
from kd.training import ClassifierModule

step, stop_at = ClassifierModule.optimizer_step, None

def optimizer_step(module, *args, **kwargs):
    step(module, *args, **kwargs)
    if module.global_step == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)

ClassifierModule.optimizer_step = optimizer_step
for processes, stop_at, flags in json.loads(sys.argv[2]):
    children = []
    for rank in range(processes):
        pid = os.fork()
        if not pid:
            os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
            rank_zero_only.rank = rank
            status = experiment([*flags, "--devices", str(processes), "--strategy", "ddp"])
            sys.stdout.flush()
            os._exit(status)
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if statuses != [0 if stop_at is None else 128 + signal.SIGTERM] * processes:
        sys.exit(f"{flags}: {statuses}")
"""
PHASES = ("teacher", "baseline", "distilled")


def _command(repository: Path, flags: str) -> tuple[list[str], dict[str, str]]:
    surroundings = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    return [sys.executable, str(repository / "experiment.py"), *f"{DIGITS} {flags}".split()], surroundings


@pytest.mark.slow
def test_two_processes_train_as_one_does_with_the_same_batch(repository: Path) -> None:
    phases = "--train_teacher --baseline --distill --max_epochs 2"
    for flags in ("--name one --batch_size 64", "--name two --batch_size 32 --devices 2 --strategy ddp"):
        command, surroundings = _command(repository, f"{phases} {flags}")
        subprocess.run(command, check=True, env=surroundings, capture_output=True, timeout=200)
    for phase in PHASES:
        one, two = (Path("logs") / name / phase / "version_0" for name in ("one", "two"))
        facts: list[dict[str, Any]] = [json.loads((place / "metrics.json").read_text()) for place in (one, two)]
        for epoch, other in zip(*(known["history"] for known in facts), strict=True):
            assert epoch == pytest.approx(other, rel=1e-4)
        answers = [np.load(place / "validation.npz") for place in (one, two)]
        # Each validation image once, in order.
        assert answers[1]["indices"].tolist() == list(range(360))
        np.testing.assert_allclose(answers[1]["logits"], answers[0]["logits"], atol=1e-3)
        # Only the first process writes.
        assert [place.name for place in two.parent.iterdir()] == ["version_0"]
        curves = [EventAccumulator(str(place)).Reload() for place in (one, two)]
        steps = [[event.step for event in events.Scalars("train/loss")] for events in curves]
        assert steps[0] == steps[1]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "shards"])
def test_a_run_is_resumed_by_another_number_of_processes(
    make_folder: MakeFolder, tmp_path: Path, repository: Path, source: str
) -> None:
    folder = make_folder(train=30, val=10)
    flags = "--image_size 16 --student_model linear --baseline --max_epochs 3 --accelerator cpu"
    if source == "shards":
        write_shards(read_splits(folder), tmp_path / "sharded", per_shard=16)
        flags += f" --data_dir {tmp_path / 'sharded'} --dataset webdataset"
    else:
        flags += f" --data_dir {folder}"

    def stage(name: str, processes: int, stop_at: int | None = None) -> tuple[int, int | None, list[str]]:
        batch_size = 16 // processes
        return processes, stop_at, [*flags.split(), "--name", name, "--batch_size", str(batch_size), "--resume"]

    # Six steps an epoch: stopped within the first and the second epoch.
    stages = [stage("alone", 1), stage("elastic", 4, stop_at=2), stage("elastic", 2, stop_at=8), stage("elastic", 1)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", STAGES, str(port), json.dumps(stages)]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    alone, elastic = (Path("logs") / name / "baseline/version_0" for name in ("alone", "elastic"))
    records: list[dict[str, Any]] = [json.loads((place / "metrics.json").read_text()) for place in (alone, elastic)]
    assert records[1]["steps"] == 18
    for epoch, other in zip(*(record["history"] for record in records), strict=True):
        assert other == pytest.approx(epoch, rel=1e-4)
    states = [
        torch.load(place / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for place in (alone, elastic)
    ]
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)
    curves = [
        {event.step: event.value for event in EventAccumulator(str(place)).Reload().Scalars("train/loss")}
        for place in (alone, elastic)
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert not list(elastic.parent.glob("version_1"))


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the first", "the second"])
def test_where_one_process_is_killed_the_other_ends_and_says_so(repository: Path, killed: str) -> None:
    command, surroundings = _command(
        repository, "--baseline --name pair --max_epochs 100000 --batch_size 32 --devices 2 --strategy ddp"
    )
    with Path("said.txt").open("w") as said:
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=surroundings)
        try:
            checkpoint = Path("logs/pair/baseline/version_0/checkpoints/best.ckpt")
            _wait_for(checkpoint.is_file, seconds=90)
            (second,) = _children(first.pid)
            os.kill(first.pid if killed == "the first" else second, signal.SIGKILL)
            _wait_for(lambda: not _is_alive(second) and first.poll() is not None, seconds=60)
        finally:
            first.kill()
            first.wait()
    assert first.returncode == (-signal.SIGKILL if killed == "the first" else 2)
    words = "error: lost contact with another process of this run"
    assert words in Path("said.txt").read_text()
    assert checkpoint.is_file()


def _wait_for(condition: Any, *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "experiment.py" in line]


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    # One that ended and that nobody asked about.
    return state.rpartition(") ")[2][0] != "Z"
