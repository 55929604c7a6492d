"""Whole sweeps on the digits, the smallest there are."""

import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna import Study
from optuna.exceptions import StorageInternalError
from optuna.trial import Trial, TrialState
from rich.console import Console
from sqlalchemy.exc import OperationalError

from kd.cli import main
from kd.errors import Interrupted, UserError
from kd.settings import resolve
from kd.sweep import run_sweep
from kd.sweep.plan import read_plan
from kd.sweep.study import open_study
from kd.sweep.trials import prepare, run_trials

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
teacher_learning_rate: 0.03
teacher_epochs: 2
max_epochs: 2
limit_train_batches: 6
limit_val_batches: 2
batch_size: 64
"""


def write_plan(text: str, student: str = "student_model: linear\n") -> Path:
    path = Path("search.yaml")
    path.write_text(BASE + student + text, encoding="utf-8")
    return path


def results(folder: str = "logs/s") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "sweep.json").read_text(encoding="utf-8"))
    return found


def states(path: Path) -> list[TrialState]:
    return [trial.state for trial in open_study(read_plan(path)).trials]


@pytest.mark.slow
def test_a_sweep_writes_its_results_and_continues_when_more_trials_are_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    search = (
        "sweep: {learning_rate: {low: 1e-3, high: 1e-1, log: true}, loss: {ce: {low: 0, high: 1}, kl: 0.9},"
        " student_model: [linear, 'mlp(hidden=[4])']}\n"
    )
    assert main(["sweep", str(write_plan(f"{search}trials: 2\n", student=""))]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"trial 1 · started · learning_rate \S+, loss\.ce \S+, student_model \S+\n", out)
    assert re.search(r"trial 1 · val acc 0\.\d\d\d · learning_rate", out)
    first = results()
    assert [trial["state"] for trial in first["trials"]] == ["finished"] * 2
    best = first["trials"][0]
    assert best["number"] == first["best"]
    assert f"Best: trial {best['number']}, validation accuracy {best['val_acc']:.2%} (2 finished)" in out
    assert best["val_acc"] == max(trial["val_acc"] for trial in first["trials"])
    assert best["epochs"][-1] == best["val_acc"]
    # Each trial has a folder of its own, and all learn from the one teacher.
    for trial in first["trials"]:
        metrics = json.loads(Path("logs/s", trial["folder"], "distilled/version_0/metrics.json").read_text())
        assert metrics["val_acc"] == trial["val_acc"]
        assert metrics["teacher_checkpoints"] == ["logs/s/teacher/version_0/checkpoints/best.ckpt"]
        assert metrics["provenance"]["settings"]["learning_rate"] == trial["parameters"]["learning_rate"]
        assert Path("logs/s", trial["folder"], "summary.json").is_file()
    page = Path("logs/s/sweep.html").read_text(encoding="utf-8")
    assert "mlp(hidden=[4])" in page
    assert page.count("<svg") == 1

    # The best trial's settings are a legal --config, which trains the same student again.
    settings, *_ = resolve(["--config", "logs/s/best.yaml"])
    assert settings.optimization.learning_rate == best["parameters"]["learning_rate"]
    assert settings.phases.name == "s-best"
    assert main(["experiment", "--config", "logs/s/best.yaml"]) == 0
    again = json.loads(Path("logs/s-best/summary.json").read_text())["phases"]["distilled"]
    assert again["val_acc_mean"] == best["val_acc"]
    capsys.readouterr()

    # Called again it continues, with the same teacher.
    assert main(["sweep", str(write_plan(f"{search}trials: 3\n", student=""))]) == 0
    out, _ = capsys.readouterr()
    assert "trial 2 · started" in out
    assert "trial 1 · started" not in out
    assert len(results()["trials"]) == 3
    assert sorted(path.name for path in Path("logs/s/teacher").iterdir()) == ["version_0"]


@pytest.mark.slow
def test_trials_of_different_lengths_are_compared_at_the_same_part_of_their_training() -> None:
    path = write_plan("sweep: {max_epochs: [2, 4]}\ntrials: 4\nprune: false\n")
    path.write_text(path.read_text(encoding="utf-8").replace("\nmax_epochs: 2", ""), encoding="utf-8")
    assert main(["sweep", str(path)]) == 0
    steps = {
        trial.params["max_epochs"]: list(trial.intermediate_values) for trial in open_study(read_plan(path)).trials
    }
    assert steps == {2: [500, 1000], 4: [250, 500, 750, 1000]}


@pytest.mark.slow
def test_trials_below_the_median_are_pruned_and_diverging_ones_fail_with_their_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_plan("sweep: {learning_rate: [0.03, 0.04, 0.05, 0.06, 1.0e-9, 1.0e+30]}\noptimizer: sgd\ntrials: 12\n")
    assert main(["sweep", str(path)]) == 0
    out, _ = capsys.readouterr()
    trials = results()["trials"]
    assert {trial["state"] for trial in trials} == {"finished", "pruned", "failed"}
    assert len(trials) == 12
    pruned = [trial for trial in trials if trial["state"] == "pruned" and trial["parameters"]["learning_rate"] == 1e-9]
    assert pruned
    assert all(len(trial["epochs"]) == 1 for trial in pruned)
    assert re.search(r"trial \d+ · pruned after epoch 1 with val acc \S+, below the median", out)
    diverged = [trial for trial in trials if trial["parameters"]["learning_rate"] == 1e30]
    assert diverged
    assert all(trial["state"] == "failed" and "finite" in trial["reason"] for trial in diverged)


def test_without_pruning_every_trial_is_finished_and_several_seeds_are_averaged() -> None:
    path = write_plan("sweep: {learning_rate: [0.05, 1.0e-9]}\ntrials: 6\nprune: false\nseeds: 2\nmax_epochs: 1\n")
    path.write_text(path.read_text().replace("max_epochs: 2\n", "", 1))
    run_sweep(path, console=Console(quiet=True))
    for trial in results()["trials"]:
        assert trial["state"] == "finished"
        assert len(trial["epochs"]) == 2
        assert trial["val_acc"] == pytest.approx(sum(trial["epochs"]) / 2)


def test_an_error_that_the_settings_did_not_cause_ends_the_sweep_and_the_trial_does_not_count() -> None:
    path = write_plan("sweep: {temperature: [2]}\ntrials: 1\n")
    in_the_way = Path("logs/s/trials/0/distilled")
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    assert main(["sweep", str(path)]) == 2
    assert states(path) == [TrialState.FAIL]
    run_sweep(path, console=Console(quiet=True))
    assert states(path) == [TrialState.FAIL, TrialState.COMPLETE]
    assert [trial["state"] for trial in results()["trials"]] == ["finished", "interrupted"]


@pytest.mark.slow
def test_a_choice_that_raises_is_a_failed_trial_and_the_search_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "nets.py"
    code.write_text(
        "import torch\nfrom torch import nn\n\n\nclass Moody(nn.Module):\n"
        "    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.layer = nn.Linear(192, num_classes)\n\n"
        "    def forward(self, images):\n"
        "        if self.training and torch.is_grad_enabled():\n            raise KeyError('a bad mood')\n"
        "        return self.layer(images.flatten(1))\n\n\n"
        "def moody(num_classes):\n    return Moody(num_classes)\n"
    )
    search = f"sweep: {{student_model: [linear, '{code}:moody']}}\ntrials: 6\n"
    assert main(["sweep", str(write_plan(search, student=""))]) == 0
    trials = results()["trials"]
    failed = [trial for trial in trials if trial["state"] == "failed"]
    assert {trial["state"] for trial in trials} == {"finished", "failed"}
    assert all(trial["reason"] == "failed: KeyError: 'a bad mood'" for trial in failed)
    assert "Traceback" in (Path("logs/s/trials") / str(failed[0]["number"]) / "error.txt").read_text()
    assert "KeyError" in capsys.readouterr().out
    # One that fails in every trial is a bug to be seen.
    write_plan(f"sweep: {{temperature: [1, 2, 3, 4]}}\ntrials: 6\nname: t\nstudent_model: '{code}:moody'\n", student="")
    text = Path("search.yaml").read_text().replace("name: s\n", "")
    Path("search.yaml").write_text(text)
    with pytest.raises(KeyError, match="a bad mood"):
        main(["sweep", "search.yaml"])


def test_a_database_that_is_gone_for_a_while_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited, states_of = list[float](), Study.get_trials
    monkeypatch.setattr("kd.sweep.trials.time.sleep", waited.append)

    def fails_twice(self: Study, **options: Any) -> Any:
        if len(waited) < 2:
            raise StorageInternalError("An exception is raised during the commit.") from OperationalError(
                "x", {}, Exception("down")
            )
        return states_of(self, **options)

    path = write_plan("sweep: {temperature: [1, 2]}\ntrials: 1\n")
    plan = read_plan(path)
    study = prepare(plan, None, Console(quiet=True))
    monkeypatch.setattr(Study, "get_trials", fails_twice)
    run_trials(plan, study, Console())
    assert waited == [6.0, 6.0]
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("The database can't be reached ((builtins.Exception) down); trying again in 6 s.") == 2
    monkeypatch.setattr("kd.sweep.trials._RETRIES", 1)
    waited.clear()
    with pytest.raises(UserError, match="kd sweep: the database can't be reached"):
        run_trials(plan, study, Console())


def test_a_teacher_is_found_and_none_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_plan("sweep: {temperature: [2]}\ntrials: 1\n")
    path.write_text(path.read_text().replace("train_teacher: true", "train_teacher: false"))
    assert main(["sweep", str(path)]) == 2
    assert "error: --distill: " in capsys.readouterr().err
    flags = "--no-distill --train_teacher --name other --dataset digits --image_size 8 --resize squash --augment none"
    more = "--accelerator cpu --teacher_model linear --max_epochs 2 --num_workers 0 --learning_rate 0.03"
    assert main(["experiment", *flags.split(), *more.split()]) == 0
    assert main(["sweep", str(path)]) == 0
    teacher = Path("logs/other/teacher/version_0/checkpoints/best.ckpt").resolve()
    assert open_study(read_plan(path)).user_attrs["teachers"] == [str(teacher)]


def test_a_moved_sweep_finds_its_teacher() -> None:
    path = write_plan("sweep: {temperature: [2]}\ntrials: 1\n")
    run_sweep(path, console=Console(quiet=True))
    Path("logs").rename("moved")
    path.write_text(path.read_text().replace("trials: 1", "trials: 2") + "default_root_dir: moved\n")
    run_sweep(path, console=Console(quiet=True))
    assert [trial["state"] for trial in results("moved/s")["trials"]] == ["finished"] * 2
    assert [folder.name for folder in Path("moved/s/teacher").iterdir()] == ["version_0"]


class StopWhenStarted(io.StringIO):
    """Sends this process a signal when a trial starts."""

    def write(self, text: str) -> int:
        if "trial 0 · started" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_a_stopped_sweep_gives_its_trial_up_and_can_be_resumed() -> None:
    path = write_plan("sweep: {temperature: [2]}\ntrials: 1\n")
    with pytest.raises(Interrupted) as stopped:
        run_sweep(path, console=Console(file=StopWhenStarted()))
    assert stopped.value.received == signal.SIGTERM
    assert stopped.value.advice.startswith("The same command resumes the sweep")
    assert states(path) == [TrialState.FAIL]
    run_sweep(path, console=Console(quiet=True))
    assert states(path) == [TrialState.FAIL, TrialState.COMPLETE]


@pytest.mark.slow
def test_a_killed_worker_loses_its_trial_alone_which_is_retried(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan("sweep: {learning_rate: {low: 1e-3, high: 1e-1, log: true}}\ntrials: 3\n")
    command = [sys.executable, "-u", "-m", "kd", "sweep", str(path)]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("trial 1 · started"):
                worker.kill()
    assert states(path) == [TrialState.COMPLETE, TrialState.RUNNING]
    # Instead of waiting until the last heartbeat is old.
    with sqlite3.connect("logs/s/sweep.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'")
    assert main(["sweep", str(path)]) == 0
    assert states(path) == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    trials = sorted(results()["trials"], key=lambda trial: int(trial["number"]))
    assert trials[1]["state"] == "interrupted"
    assert trials[2]["parameters"] == trials[1]["parameters"] != trials[3]["parameters"]
    assert [folder.name for folder in Path("logs/s/teacher").iterdir()] == ["version_0"]


@pytest.mark.slow
def test_workers_share_the_trials_and_one_table(
    repository: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    path = write_plan("sweep: {learning_rate: {low: 1e-3, high: 1e-1, log: true}}\ntrials: 4\n")
    assert main(["sweep", str(path), "--workers", "2", "--storage", "sqlite:///elsewhere.db"]) == 0
    out, _ = capfd.readouterr()
    finished = re.findall(r"trial (\d) · (?:val acc|pruned)", out)
    assert len(set(finished)) == len(finished) == 4
    assert len(results()["trials"]) == 4
    assert out.count("Best: trial") == 1
    assert not Path("logs/s/sweep.db").exists()


@pytest.mark.parametrize("asks_at_once", [False, True])
def test_just_as_many_trials_as_planned_are_finished_beside_another_worker(
    asks_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_plan("sweep: {temperature: [2]}\ntrials: 1\n")
    plan = read_plan(path)
    study = prepare(plan, None, Console(quiet=True))
    ask, others = study.ask, list[Trial]()

    def ask_after_the_other_worker() -> Trial:
        others.append(ask())
        return ask()

    if asks_at_once:
        monkeypatch.setattr(study, "ask", ask_after_the_other_worker)
    else:
        others.append(ask())
    monkeypatch.setattr("kd.sweep.trials.time.sleep", lambda _: study.tell(others[0], 0.5))
    run_trials(plan, study, Console(quiet=True))
    assert states(path) == [TrialState.COMPLETE, *([TrialState.FAIL] if asks_at_once else [])]
    assert not Path("logs/s/trials").exists()
