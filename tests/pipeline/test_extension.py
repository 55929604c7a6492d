"""Finished runs are extended by more epochs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.cli import experiment
from tests.conftest import MakeFolder
from tests.pipeline.test_splits import FLAGS


def record(name: str, phase: str = "baseline", version: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(f"logs/{name}/{phase}/version_{version}/metrics.json").read_text())
    return content


def weights(name: str, phase: str = "baseline") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(f"logs/{name}/{phase}/version_0/checkpoints/last.ckpt")["state_dict"]
    return state


def test_with_a_constant_learning_rate_the_result_is_that_of_all_epochs_at_once(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, "--data_dir", str(make_folder(train=12, val=6)), "--baseline", "--schedule", "constant"]
    flags += ["--ema", "0.9", "--augment", "crop", "--resume", "auto"]
    assert experiment([*flags, "--name", "whole", "--max_epochs", "4"]) == 0
    assert experiment([*flags, "--name", "part", "--max_epochs", "2"]) == 0
    capsys.readouterr()
    assert experiment([*flags, "--name", "part", "--max_epochs", "4"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "baseline linear · extending logs/part/baseline/version_0" in output
    assert "note: from 2 to 4 epochs: the result is that of 4 epochs at once" in output
    expected, found = weights("whole"), weights("part")
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    whole, part = record("whole"), record("part")
    assert part["history"] == whole["history"]
    assert (part["epochs"], part["best_val_acc"]) == (4, whole["best_val_acc"])
    kept = json.loads(Path("logs/part/baseline/version_0/metrics-2-epochs.json").read_text())
    assert (kept["epochs"], kept["history"]) == (2, whole["history"][:2])
    # Nothing to do in a third call, and fewer epochs are another run.
    assert experiment([*flags, "--name", "part", "--max_epochs", "4"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert experiment([*flags, "--name", "part", "--max_epochs", "1"]) == 0
    assert "was trained with --max_epochs 4 (now 1); training another version" in " ".join(
        capsys.readouterr().out.split()
    )
    assert record("part", version=1)["epochs"] == 1


def test_a_decayed_learning_rate_rises_again_which_is_said(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, "--data_dir", str(make_folder(train=12, val=6)), "--train_teacher", "--resume", "auto"]
    assert experiment([*flags, "--teacher_epochs", "2"]) == 0
    capsys.readouterr()
    assert experiment([*flags, "--teacher_epochs", "4"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "the schedules of 2 epochs have ended, and go on as those of 4: the learning rate rises again" in output
    rates = [epoch["lr"] for epoch in record("pets", "teacher")["history"]]
    # Half a cosine of two epochs, and the second half of one of four.
    assert rates[1] < 1e-3
    assert rates[2] > 1e-3
    # Another number of the student's epochs isn't another teacher.
    assert experiment([*flags, "--teacher_epochs", "4", "--max_epochs", "9"]) == 0
    assert "already finished: logs/pets/teacher/version_0" in capsys.readouterr().out


def test_other_settings_are_another_run(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--data_dir", str(make_folder(train=12, val=6)), "--baseline", "--resume", "auto"]
    assert experiment(flags) == 0
    capsys.readouterr()
    assert experiment([*flags, "--max_epochs", "4", "--learning_rate", "0.1"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "--learning_rate 0.01 (now 0.1); --max_epochs 2 (now 4); training another version" in output
    assert (record("pets")["epochs"], record("pets", version=1)["epochs"]) == (2, 4)
