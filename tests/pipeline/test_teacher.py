import json
import math
import os
from pathlib import Path

import pytest

from kd.errors import UserError
from kd.pipeline.teacher import chance, check_classes, find_teacher, is_no_better_than_chance

FACTS = {"data": "photos", "model": "resnet18", "image_size": 32, "seed": 0, "recipe": {}, "val_acc": 0.9}


def left(root: Path, experiment: str, version: int, *, when: float, finished: bool = True, **facts: object) -> Path:
    folder = root / experiment / "teacher" / f"version_{version}"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.ckpt").touch()
    if finished:
        metrics = folder / "metrics.json"
        metrics.write_text(json.dumps(FACTS | facts))
        os.utime(metrics, (when, when))
    return folder / "checkpoints" / "best.ckpt"


def found(root: Path, folder: Path) -> Path:
    return find_teacher(root, folder, data="photos", model="resnet18", image_size=32).checkpoint


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
        UserError, match=r"no finished resnet18 was trained for photos at 32 px.\n  --train_teacher trains"
    ):
        found(tmp_path, tmp_path / "here")
    left(tmp_path, "here", 0, when=10, model="resnet50")
    with pytest.raises(UserError, match=r"There are: resnet50 for photos at 32 px \(.*here/teacher/version_0\)"):
        found(tmp_path, tmp_path / "here")


@pytest.mark.parametrize(
    ("have", "words"),
    [
        (("a", "b"), r"it has 2 classes \(a, b\), pets has 3 \(a, b, c\)"),
        (("a", "c", "b"), "they are in another order: class 1 is 'c' to it, and 'b' in pets"),
        (("a", "b", "d"), "only it has d; only pets has c"),
    ],
)
def test_other_classes_are_refused(have: tuple[str, ...], words: str) -> None:
    check_classes(("a", "b", "c"), ("a", "b", "c"), whose="it", data="pets")
    with pytest.raises(UserError, match=words):
        check_classes(have, ("a", "b", "c"), whose="the teacher x", data="pets")


@pytest.mark.parametrize(
    ("accuracy", "labels", "refused"),
    [
        (1.0, [0, 1] * 4, False),  # few images, but all of them right
        (1.0, [0] * 10, False),
        (0.75, [0, 1] * 4, True),
        (0.5, [0, 1] * 5000, True),
        (0.51, [0, 1] * 5000, True),
        (0.52, [0, 1] * 5000, False),
        (0.9, [0] * 90 + [1] * 10, True),
        (0.0, [0, 1] * 4, True),
    ],
)
def test_chance_is_the_most_frequent_class_and_its_noise(accuracy: float, labels: list[int], refused: bool) -> None:
    assert is_no_better_than_chance(accuracy, labels) is refused


def test_chance_leaves_one_in_a_thousand() -> None:
    labels = [0, 1] * 50
    limit = next(right for right in range(101) if not is_no_better_than_chance(right / 100, labels))
    tails = [sum(math.comb(100, k) for k in range(right, 101)) / 2**100 for right in (limit - 1, limit)]
    assert tails[0] > 1e-3 >= tails[1]
    assert chance([0, 0, 1]) == pytest.approx(2 / 3)
