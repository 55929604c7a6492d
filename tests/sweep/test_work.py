"""Whole sweeps on the digits, as the command runs them; the smallest there are."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kd.cli import main
from kd.settings import resolve
from kd.sweep import read_plan, run_sweep
from kd.sweep.study import Study

BASE = """
name: s
dataset: digits
image_size: 8
resize: squash
augment: none
num_workers: 0
accelerator: cpu
train_teacher: true
teacher_model: linear
student_model: linear
teacher_learning_rate: 0.03
teacher_epochs: 2
max_epochs: 2
limit_train_batches: 6
limit_val_batches: 2
batch_size: 64
"""


def written(text: str) -> Path:
    path = Path("search.yaml")
    base = BASE.replace("student_model: linear\n", "") if "student_model" in text else BASE
    path.write_text(base + text, encoding="utf-8")
    return path


def results(folder: str = "logs/s") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "sweep.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_a_sweep_leaves_a_table_the_best_trials_settings_and_a_page_and_goes_on_when_more_are_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    search = (
        "sweep: {learning_rate: {low: 1e-3, high: 1e-1, log: true}, loss: {ce: {low: 0, high: 1}, kl: 0.9},"
        " student_model: [linear, 'mlp(hidden=[4])']}\nlost_after: 20\n"
    )
    assert main(["sweep", str(written(f"{search}trials: 2\n"))]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Teacher: epoch 2/2" in out
    assert re.search(r"Trial 1: learning_rate \S+, loss\.ce \S+, student_model \S+\nTrial 1: \d+\.\d\d%\n", out)
    assert "is the best of 2 trials, 0 of them pruned" in out
    first = results()
    assert [one["state"] for one in first["trials"]] == ["finished"] * 2
    best = first["trials"][0]
    assert best["number"] == first["best"]
    assert best["val_acc"] == max(one["val_acc"] for one in first["trials"])
    assert best["epochs"][-1] == best["val_acc"]
    # Each lives in a folder of its own, and learns from the one teacher.
    for one in first["trials"]:
        metrics = json.loads(Path("logs/s", one["folder"], "distilled/version_0/metrics.json").read_text())
        assert metrics["val_acc"] == one["val_acc"]
        assert metrics["recipe"]["teacher"] == str(Path("logs/s/teacher/version_0/checkpoints/best.ckpt").resolve())
        assert metrics["recipe"]["learning_rate"] == one["parameters"]["learning_rate"]
        assert Path("logs/s", one["folder"], "summary.json").is_file()
    page = Path("logs/s/sweep.html").read_text(encoding="utf-8")
    assert "mlp(hidden=[4])" in page
    assert page.count("<svg") == 3
    assert Path("logs/s/figures/trials.png").is_file()

    # The best one's settings are a file for --config.
    settings, *_ = resolve(["--config", "logs/s/best.yaml"])
    assert settings.optimization.learning_rate == best["parameters"]["learning_rate"]
    assert settings.phases.name == "s-best"
    assert main(["experiment", "--config", "logs/s/best.yaml"]) == 0
    again = json.loads(Path("logs/s-best/summary.json").read_text())["phases"]["distilled"]
    assert again["val_acc_mean"] == best["val_acc"]
    capsys.readouterr()

    # Called again it goes on, from the same teacher.
    assert main(["sweep", str(written(f"{search}trials: 3\n"))]) == 0
    out, _ = capsys.readouterr()
    assert "Trial 2: " in out
    assert "Trial 1: " not in out
    assert "Teacher: " not in out
    assert len(results()["trials"]) == 3
    assert sorted(path.name for path in Path("logs/s/teacher").iterdir()) == ["version_0"]


@pytest.mark.slow
def test_trials_that_are_worse_than_most_are_pruned_and_those_that_leave_the_numbers_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written(
        "sweep: {learning_rate: [0.03, 0.04, 0.05, 0.06, 1e-9, 1e30]}\noptimizer: sgd\ntrials: 12\nlost_after: 20\n"
    )
    assert main(["sweep", str(path)]) == 0
    out, _ = capsys.readouterr()
    trials = results()["trials"]
    states = {one["state"] for one in trials}
    assert states == {"finished", "pruned"}
    assert len(trials) == 12
    below = [one for one in trials if one["state"] == "pruned" and one["parameters"]["learning_rate"] == "1e-9"]
    assert below
    assert all(len(one["epochs"]) == 1 for one in below)
    assert "is below the median" in out
    wild = [one for one in trials if one["parameters"]["learning_rate"] == "1e30"]
    assert wild
    assert all(one["state"] == "pruned" for one in wild)
    assert "pruned: not a finite number in step" in out


@pytest.mark.slow
def test_without_pruning_every_trial_is_finished() -> None:
    run_sweep(
        written("sweep: {learning_rate: [0.05, 1e-9]}\ntrials: 7\nprune: false\n"),
        console=Console(quiet=True),
    )
    assert [one["state"] for one in results()["trials"]] == ["finished"] * 7
    assert all(len(one["epochs"]) == 2 for one in results()["trials"])


def test_the_accuracy_of_several_seeds_is_their_mean() -> None:
    run_sweep(written("sweep: {temperature: [2]}\ntrials: 1\nseeds: 2\n"), console=Console(quiet=True))
    (trial,) = results()["trials"]
    assert len(trial["epochs"]) == 4
    assert trial["val_acc"] == pytest.approx((trial["epochs"][1] + trial["epochs"][3]) / 2)


def test_a_mistake_that_shows_in_a_trial_names_it_and_the_trial_does_not_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written("sweep: {temperature: [2]}\ntrials: 1\n")
    Path("logs/s").mkdir(parents=True)
    # No trial can have a folder.
    Path("logs/s/trials").mkdir()
    Path("logs/s/trials/0").mkdir()
    Path("logs/s/trials/0/distilled").write_text("in the way")
    with pytest.raises(OSError, match="distilled"):
        main(["sweep", str(path)])
    assert [one.state.name for one in Study(read_plan(path)).trials()] == ["FAIL"]


@pytest.mark.slow
def test_a_found_teacher_is_taken_and_none_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    path = written("sweep: {temperature: [2]}\ntrials: 1\n")
    path.write_text(path.read_text().replace("train_teacher: true", "train_teacher: false"))
    assert main(["sweep", str(path)]) == 2
    assert "error: --distill: there is no teacher" in capsys.readouterr().err
    flags = "--no-distill --train_teacher --name other --dataset digits --image_size 8 --resize squash --augment none"
    more = "--accelerator cpu --teacher_model linear --max_epochs 2 --num_workers 0 --learning_rate 0.03"
    assert main(["experiment", *flags.split(), *more.split()]) == 0
    assert main(["sweep", str(path)]) == 0
    teacher = Path("logs/other/teacher/version_0/checkpoints/best.ckpt").resolve()
    assert results()["teachers"] == [str(teacher)]


def started(repository: Path, *flags: str, log: str) -> "subprocess.Popen[bytes]":
    line = [sys.executable, "-u", "-m", "kd", "sweep", "search.yaml", *flags]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    with Path(log).open("wb") as file:
        return subprocess.Popen(line, stdout=file, stderr=file, env=environment)


def wait_for(log: str, words: str, *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not re.search(words, Path(log).read_text(encoding="utf-8")):
        assert time.monotonic() < end, Path(log).read_text(encoding="utf-8")
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_its_trial_alone(repository: Path) -> None:
    written("sweep: {learning_rate: {low: 1e-3, high: 1e-1, log: true}}\ntrials: 12\nlost_after: 6\n")
    killed, left = (started(repository, log=log) for log in ("killed.txt", "left.txt"))
    # It is in the middle of its second trial.
    wait_for("killed.txt", r"(?s)Trial \d+: .*%.*Trial \d+: learning_rate \S+\n$")
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(timeout=10) == -signal.SIGKILL
    assert left.wait(timeout=200) == 0, Path("left.txt").read_text()
    out = Path("left.txt").read_text(encoding="utf-8")
    states = [one["state"] for one in results()["trials"]]
    assert states.count("finished") + states.count("pruned") == 12
    assert states.count("lost") == 1
    assert len(states) == 13
    assert re.search(r"Trial \d+: lost, as its worker gave no sign of life for 6 s", out)
    assert re.search(r"Trial \d+ is the best of 12 trials, \d+ of them pruned: \d", out)
    # The teacher was trained once.
    assert [path.name for path in Path("logs/s/teacher").iterdir()] == ["version_0"]
    assert sum("Teacher: epoch 2/2" in Path(log).read_text() for log in ("killed.txt", "left.txt")) == 1


@pytest.mark.slow
def test_workers_that_are_started_together_share_the_trials_and_end_together(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    path = written("sweep: {learning_rate: {low: 1e-3, high: 1e-1, log: true}}\ntrials: 6\nlost_after: 20\n")
    url = "sqlite:///elsewhere.db"
    assert main(["sweep", str(path), "--workers", "2", "--storage", url]) == 0
    out, _ = capsys.readouterr()
    assert len(re.findall(r"Trial \d: \S+ \(learning_rate \S+\)", out)) == 6
    assert "is the best of 6 trials" in out
    logs = [Path(f"logs/s/worker-{number}.log").read_text(encoding="utf-8") for number in (1, 2)]
    # Both had a part in it, and none of them printed the table.
    assert all("Trial " in log for log in logs)
    assert not any("is the best of" in log for log in logs)
    assert Path("elsewhere.db").is_file()
    assert not Path("logs/s/sweep.db").exists()


@pytest.mark.slow
def test_a_worker_that_is_asked_to_stop_gives_its_trial_back_at_once(repository: Path) -> None:
    written("sweep: {temperature: [2]}\ntrials: 1\nlost_after: 300\nmax_epochs: 500\n")
    stopped = started(repository, log="stopped.txt")
    wait_for("stopped.txt", r"Trial 0: temperature 2\n$")
    time.sleep(1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=60) == 128 + signal.SIGTERM
    assert "The same command goes on with the sweep; this trial is begun anew." in Path("stopped.txt").read_text()
    study = Study(read_plan(Path("search.yaml")))
    assert [one.state.name for one in study.trials()] == ["FAIL"]
    again = study.next_trial()
    assert again is not None
    assert again.number == 1
