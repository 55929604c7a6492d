"""An experiment that is cut off goes on where it was, and ends as if it had been left in peace."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.kills import differences, run_and_kill, run_to_completion
from kd.cli import experiment
from kd.models import find_damage
from kd.pipeline.run_store import METRICS_FILE
from kd.training.resume import steps_in
from tests.conftest import MakeFolder

TINY = "--image_size 16 --batch_size 8 --augment none --accelerator cpu --teacher_model linear --student_model linear"
PHASES = "--train_teacher --baseline --distill --max_epochs 2 --name pets --allow_weak_teacher"


def _versions(place: Path) -> dict[str, list[str]]:
    phases = ("teacher", "baseline", "distilled")
    return {phase: sorted(one.name for one in (place / phase).iterdir()) for phase in phases}


def test_what_is_finished_is_not_trained_again(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"--data_dir {make_folder()} {TINY} {PHASES}".split()
    # With nothing to resume, it starts.
    assert experiment([*flags, "--resume"]) == 0
    place = Path("logs/pets")
    first = json.loads((place / "summary.json").read_text())
    (place / "distilled" / "version_0" / METRICS_FILE).unlink()
    capsys.readouterr()
    assert experiment([*flags, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "teacher linear · already finished: logs/pets/teacher/version_0" in said
    assert "baseline linear · already finished" in said
    assert "distilled linear · resuming logs/pets/distilled/version_0" in said
    assert _versions(place) == {key: ["version_0"] for key in ("teacher", "baseline", "distilled")}
    again = json.loads((place / "summary.json").read_text())
    for phase, summary in first["phases"].items():
        assert again["phases"][phase]["val_acc_mean"] == summary["val_acc_mean"]


def test_a_folder_is_resumed_with_its_own_settings(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment(f"--data_dir {make_folder()} {TINY} {PHASES}".split()) == 0
    capsys.readouterr()
    inside = Path("logs/pets/baseline/version_0/checkpoints/last.ckpt")
    assert experiment(["--resume", str(inside)]) == 0
    assert capsys.readouterr().out.count("already finished") == 3
    # The command line wins, as ever: another seed is another training.
    assert experiment(["--resume=logs/pets", "--seed", "5", "--no-train_teacher"]) == 0
    assert _versions(Path("logs/pets"))["baseline"] == ["version_0", "version_1"]


def test_other_settings_are_no_resume(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"--data_dir {make_folder()} {TINY} --baseline --name pets --max_epochs 2".split()
    assert experiment(flags) == 0
    Path("logs/pets/baseline/version_0", METRICS_FILE).unlink()
    assert experiment([*flags, "--resume", "--learning_rate", "0.5"]) == 2
    said = capsys.readouterr().err
    assert "version_0 was started with --learning_rate 0.001 (now 0.5); restore what it was started with" in said
    assert experiment(["--resume", "logs/nobody"]) == 2
    assert "--resume logs/nobody: no such folder" in capsys.readouterr().err
    Path("empty").mkdir()
    assert experiment(["--resume", "empty"]) == 2
    assert "not an experiment's folder, as it has no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_how_to_go_on(
    repository: Path, make_folder: MakeFolder, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    flags = f"--data_dir {make_folder(train=40)} {TINY} --baseline --name pets --max_epochs 100000 --num_workers 1"
    command = [sys.executable, str(repository / "experiment.py"), *flags.split()]
    surroundings = os.environ | {"PYTHONPATH": str(repository)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings, start_new_session=True
    ) as process:
        _wait_for(Path("logs/pets/baseline/version_0/checkpoints/best.ckpt"))
        # As a terminal and a scheduler do it: to all processes, the workers too.
        os.killpg(process.pid, sent)
        _, said = process.communicate(timeout=60)
    assert process.returncode == status
    place = "logs/pets/baseline/version_0/checkpoints/last.ckpt"
    assert said.strip().splitlines() == [
        f"stopped by {sent.name}: saved in {place}",
        "Resume with the same command and --resume.",
    ]
    assert Path(place).is_file()


def test_a_second_signal_ends_the_process_at_once(repository: Path, make_folder: MakeFolder) -> None:
    flags = f"--data_dir {make_folder(train=40)} {TINY} --baseline --name pets --max_epochs 100000 --num_workers 2"
    command = [sys.executable, str(repository / "experiment.py"), *flags.split(), "--checkpoint_every", "1"]
    surroundings = os.environ | {"PYTHONPATH": str(repository)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=surroundings, start_new_session=True
    ) as process:
        last = Path("logs/pets/baseline/version_0/checkpoints/last.ckpt")
        _wait_for(last)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.005)
        _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    # The first signal may have ended the process before the second arrived.
    assert messages.splitlines()[0] in (
        "stopped by a second SIGINT; the last checkpoint is intact",
        f"stopped by SIGINT: saved in {last}",
    )
    assert find_damage(last) is None


def test_slurm_has_the_job_saved_at_the_end_of_a_step_and_queued_again(
    repository: Path, make_folder: MakeFolder, tmp_path: Path
) -> None:
    asked = tmp_path / "asked.txt"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    job = {"NTASKS": "1", "JOB_ID": "12", "JOB_NAME": "kd", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    surroundings = os.environ | {f"SLURM_{name}": value for name, value in job.items()}
    surroundings |= {"PYTHONPATH": str(repository), "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    flags = f"--data_dir {make_folder(train=40)} {TINY} --baseline --name pets --max_epochs 100000 --resume"
    command = [sys.executable, str(repository / "experiment.py"), *flags.split()]
    place = Path("logs/pets/baseline/version_0")
    for until in ("queued again", "resumed"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings) as process:
            if until == "queued again":
                _wait_for(place / "checkpoints" / "best.ckpt")
                process.send_signal(signal.SIGUSR1)
                _wait_for(asked)
                assert asked.read_text() == "requeue 12\n"
                process.kill()
            else:
                assert process.stdout is not None
                assert "baseline linear · resuming logs/pets/baseline/version_0\n" in process.stdout
                process.terminate()
    saved = [place / name for name in ("hpc_ckpt_1.ckpt", "checkpoints/last.ckpt")]
    assert all(path.is_file() for path in saved)
    assert steps_in(saved[1]) >= steps_in(saved[0])


def test_without_scontrol_a_job_is_saved_and_told_how_to_go_on(
    repository: Path, make_folder: MakeFolder, tmp_path: Path
) -> None:
    job = {"NTASKS": "1", "JOB_ID": "12", "JOB_NAME": "kd", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    surroundings = os.environ | {f"SLURM_{name}": value for name, value in job.items()}
    surroundings |= {"PYTHONPATH": str(repository), "PATH": str(tmp_path)}
    flags = f"--data_dir {make_folder(train=40)} {TINY} --baseline --name pets --max_epochs 100000"
    command = [sys.executable, str(repository / "experiment.py"), *flags.split()]
    place = Path("logs/pets/baseline/version_0/checkpoints")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings) as process:
        assert process.stdout is not None
        _wait_for(place / "best.ckpt")
        process.send_signal(signal.SIGUSR1)
        message = next(line for line in process.stdout if line.startswith("SIGUSR1"))
        process.kill()
    assert message == (
        f"SIGUSR1: saved in {place / 'last.ckpt'}; the job was not requeued, as there is no scontrol here. Submit it "
        "again with --resume; training goes on until it is ended.\n"
    )
    assert steps_in(place / "last.ckpt") > 0


def _wait_for(file: Path) -> None:
    until = time.monotonic() + 60
    while not file.is_file() and time.monotonic() < until:
        time.sleep(0.05)


@pytest.mark.slow
def test_a_repeatedly_killed_and_resumed_experiment_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    for root in (uninterrupted, killed):
        root.mkdir()
    short = ("--max_epochs", "3", "--teacher_epochs", "6")
    run_to_completion(uninterrupted, *short)
    phases = [run_and_kill(killed, *short, checkpoints=count, seconds=0.02) for count in (9, 39)]
    assert phases == ["teacher", "baseline"]
    run_to_completion(killed, "--resume", *short)
    assert differences(uninterrupted, killed) == []
