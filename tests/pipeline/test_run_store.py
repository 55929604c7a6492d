import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from kd.errors import UserError
from kd.pipeline.run_store import find_teacher
from kd.training import Run

CONTENTS = {"training images": "6 images", "validation images": "2 images"}
RUN = Run(
    phase="teacher",
    seed=0,
    model="resnet18",
    parameters=1,
    epochs=1,
    steps=1,
    val_acc=0.9,
    best_val_acc=0.9,
    val_loss=None,
    agreement=None,
    seconds=1.0,
    images_per_second=1.0,
    checkpoint=None,
    folder=None,
)
FACTS = asdict(RUN) | {
    "data": "photos",
    "image_size": 32,
    "provenance": {"data": CONTENTS},
    "objective": None,
    "teacher_checkpoints": [],
    "teacher_predictions": None,
}


def left(root: Path, experiment: str, version: int, *, when: float, finished: bool = True, **facts: object) -> Path:
    folder = root / experiment / "teacher" / f"version_{version}"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.ckpt").touch()
    if finished:
        metrics = folder / "metrics.json"
        metrics.write_text(json.dumps(FACTS | facts))
        os.utime(metrics, (when, when))
    return folder / "checkpoints" / "best.ckpt"


def found(root: Path, folder: Path) -> Path | None:
    return find_teacher(root, folder, data="photos", contents=CONTENTS, model="resnet18", image_size=32).checkpoint


def test_the_newest_finished_teacher_alike_is_taken(tmp_path: Path) -> None:
    here = tmp_path / "here"
    other = left(tmp_path, "other", 0, when=50)
    assert found(tmp_path, here) == other
    left(tmp_path, "here", 0, when=10)
    newest = left(tmp_path, "here", 1, when=20)
    left(tmp_path, "here", 2, when=30, model="resnet50")
    left(tmp_path, "here", 3, when=30, data="pets")
    left(tmp_path, "here", 4, when=30, image_size=64)
    left(tmp_path, "here", 5, when=30, finished=False)
    broken = left(tmp_path, "here", 6, when=60)
    (broken.parents[1] / "metrics.json").write_text("{")
    # This experiment's own comes before a newer one of another experiment.
    assert found(tmp_path, here) == newest


def test_no_teacher_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no finished resnet18 for photos at 32 px under .*; train one with --train_teacher"
    ):
        found(tmp_path, tmp_path / "here")
    left(tmp_path, "here", 0, when=10, model="resnet50")
    with pytest.raises(UserError, match=r"Found: resnet50 for photos at 32 px \(.*here/teacher/version_0\)"):
        found(tmp_path, tmp_path / "here")
