"""A whole experiment on sharded archives, as the commands run it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.cli import experiment, main
from kd.data import load_splits
from tests.conftest import MakeFolder

pytest.importorskip("webdataset")

TINY = (
    "--dataset webdataset --image_size 16 --batch_size 8 --accelerator cpu --max_epochs 3 --learning_rate 0.02 "
    "--name pets --teacher_model linear --student_model linear"
)


@pytest.fixture
def sharded(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> Path:
    photos = make_folder(train=12)
    folder = photos.parent / "sharded"
    assert main(["shard", str(photos), str(folder), "--per_shard", "5"]) == 0
    said = capsys.readouterr().out
    assert said == (
        "51 images written; number of shards: train: 8, val: 3\n"
        f"Train with: experiment.py --dataset webdataset --data_dir {folder}\n"
    )
    return folder


def counts_each_once(version: Path, folder: Path) -> None:
    """Compare what was said of each validation image with the accuracy that was measured while they were streamed."""
    answers, val = np.load(version / "validation.npz"), load_splits("webdataset", folder).val
    assert answers["indices"].tolist() == list(range(15))
    assert answers["labels"].tolist() == list(val.labels)
    assert answers["keys"].tolist() == list(val.keys)
    facts: dict[str, Any] = json.loads((version / "metrics.json").read_text())
    right = answers["logits"].argmax(axis=1) == answers["labels"]
    assert facts["val_acc"] == pytest.approx(right.mean())
    # Logits are where they belong: else the loss would be another one.
    shifted = answers["logits"] - answers["logits"].max(axis=1, keepdims=True)
    likely = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    assert facts["val_loss"] == pytest.approx(-likely[np.arange(15), answers["labels"]].mean(), rel=1e-3)


def test_an_experiment_on_shards_runs_from_start_to_end(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{TINY} --data_dir {sharded} --train_teacher --baseline --distill"
    assert experiment(flags.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Accuracy on the validation images of sharded" in out
    for phase in ("teacher", "baseline", "distilled"):
        counts_each_once(Path("logs/pets") / phase / "version_0", sharded)
    # Pictures of single validation images are read at their places.
    assert Path("logs/pets/figures/disagreements.png").is_file()
    checkpoint = "logs/pets/distilled/version_0/checkpoints/best.ckpt"
    assert main(f"evaluate {checkpoint} --dataset webdataset --data_dir {sharded} --accelerator cpu".split()) == 0
    assert "15" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--train_fraction 0.5", "a stream is read as a whole"),
        ("--unlabeled_rest --train_fraction 1", "a stream is read as a whole"),
        ("--unlabeled_data more", "images of a folder can't be mixed into a stream"),
        ("--image_cache here", "streamed images are not cached"),
        ("--teacher_cache here", "outputs for streamed images are not stored"),
        ("--augment_on device", "streamed images are augmented by the data loading processes"),
    ],
)
def test_settings_that_streams_cannot_have_are_refused(
    sharded: Path, flags: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment(f"{TINY} --data_dir {sharded} {flags}".split()) == 2
    flag = "--unlabeled_rest" if "rest" in flags else flags
    assert f"{flag}: not available with --dataset webdataset: {reason}" in capsys.readouterr().err
    assert not Path("logs").exists()


def test_a_missing_folder_of_shards_is_named(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment(f"{TINY} --data_dir {sharded} --val_data test".split()) == 2
    assert "test: there is no such folder of shards (set by --val_data)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("absent out", "--data_dir absent: there is no such folder"),
        ("{photos} {photos}", "this already exists"),
        ("{photos} out --per_shard 0", "--per_shard 0: must be at least 1"),
    ],
)
def test_shards_that_can_not_be_made_are_refused(
    make_folder: MakeFolder, flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shard", *flags.format(photos=make_folder()).split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_stream_out(sharded: Path, repository: Path) -> None:
    flags = f"{TINY} --data_dir {sharded} --baseline --devices 2 --strategy ddp --num_workers 2"
    surroundings = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repository / "experiment.py"), *flags.split()]
    subprocess.run(command, check=True, env=surroundings, capture_output=True, timeout=200)
    counts_each_once(Path("logs/pets/baseline/version_0"), sharded)
    facts = json.loads(Path("logs/pets/baseline/version_0/metrics.json").read_text())
    # 36 images in batches of eight, on two processes.
    assert facts["steps"] == 3 * 3
