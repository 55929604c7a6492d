"""kd predict: which images it takes, and what it writes."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd.cli import main
from kd.data import Layout, read_splits
from kd.deploy import open_student
from kd.models import CLASSIFIER_KEY, STATE_PREFIX, build_classifier
from tests.conftest import MakeFolder
from tests.pipeline.test_splits import FLAGS

CLASSES = ("=cmd|' /C calc'!A0", "蟻", "cat")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Write a linear classifier that compares the color channels."""
    classifier = build_classifier("linear", classes=CLASSES, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    weights = torch.zeros(3, 3, 8, 8)
    for channel in range(3):
        weights[channel, channel] = 4 / 64
    classifier.network.load_state_dict({"1.weight": weights.flatten(1), "1.bias": torch.zeros(3)})
    state = {STATE_PREFIX + name: value for name, value in classifier.state_dict().items()}
    path = tmp_path / "student.ckpt"
    torch.save({CLASSIFIER_KEY: classifier.description.plain(), "state_dict": state}, path)
    return str(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name, color in (("red.png", (255, 0, 0)), ("green.gif", (0, 255, 0)), ("deep/blue.jpg", (0, 0, 255))):
        Image.new("RGB", (8, 8), color).save(folder / name)
    Image.new("RGB", (8, 8), (120, 100, 90)).save(folder / "-gray.png")
    Image.new("RGB", (8, 8), (0, 0, 255)).save(folder / "no-suffix", format="PNG")
    for name in ("notes.txt", "labels.csv.bak", ".hidden"):
        (folder / name).write_text("no image")
    return folder


def rows_of(capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], str]:
    captured = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(captured.out))), captured.err


def test_a_folder_is_answered_in_every_format_and_the_rest_is_named(
    checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", checkpoint, str(photos), "--csv", "--top", "1"]) == 0
    rows, err = rows_of(capsys)
    found = {Path(row["image"]).name: row["class_1"] for row in rows}
    assert found == {
        "red.png": f"'{CLASSES[0]}",
        "green.gif": "蟻",
        "blue.jpg": "cat",
        "-gray.png": f"'{CLASSES[0]}",
        "no-suffix": "cat",
    }
    expected = f"note: skipped 2 files that are no images: {photos / 'labels.csv.bak'}, {photos / 'notes.txt'}\n"
    assert err == expected


def test_patterns_and_tables_name_images(checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", checkpoint, str(photos / "**" / "*.[jg]*"), "--csv"]) == 0
    assert {Path(row["image"]).name for row in rows_of(capsys)[0]} == {"green.gif", "blue.jpg"}
    table = photos / "list.csv"
    table.write_text("id;file\n1;deep/blue.jpg\n2;red.png\n")
    assert main(["predict", checkpoint, str(table), "--csv"]) == 0
    assert [row["image"] for row in rows_of(capsys)[0]] == [str(photos / "deep" / "blue.jpg"), str(photos / "red.png")]
    table.write_text("id;where\n1;red.png\n2;absent.png\n")
    assert main(["predict", checkpoint, str(table)]) == 2
    assert "its columns: id, where; name it with --path_column" in capsys.readouterr().err
    assert main(["predict", checkpoint, str(table), "--path_column", "where", "--csv"]) == 1
    rows, err = rows_of(capsys)
    assert len(rows) == 1
    assert f"error: {photos / 'absent.png'}: this image can't be decoded" in err
    assert main(["predict", checkpoint, str(photos / "*.xyz")]) == 2
    assert "*.xyz: no such image or folder" in capsys.readouterr().err


def test_below_a_threshold_the_class_is_unsure(
    checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [str(photos / "-gray.png"), str(photos / "red.png")]
    assert main(["predict", checkpoint, *images, "--threshold", "0.6", "--csv"]) == 0
    rows, _ = rows_of(capsys)
    assert [row["decision"] for row in rows] == ["unsure", f"'{CLASSES[0]}"]
    assert float(rows[0]["probability_1"]) < 0.6 < float(rows[1]["probability_1"])
    assert main(["predict", checkpoint, *images, "--threshold", "0.6", "--json"]) == 0
    assert [row["class"] for row in json.loads(capsys.readouterr().out)] == ["unsure", CLASSES[0]]
    assert main(["predict", checkpoint, *images, "--threshold", "0.6"]) == 0
    assert "-gray.png  unsure  " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["predict", checkpoint, *images, "--threshold", "60"])


@pytest.mark.parametrize("flags", [[], ["--csv"]])
def test_any_output_takes_any_name_and_may_be_closed(
    checkpoint: str, photos: Path, repository: Path, flags: list[str]
) -> None:
    many = [str(photos / "green.gif")] * 3_000
    command = [sys.executable, "-m", "kd", "predict", checkpoint, *many, *flags]
    environment = {"PYTHONPATH": str(repository), "PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0
    assert "\\u87fb" in lines[-1]


def test_deep_images_are_scaled_as_in_training(
    tmp_path: Path, make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(train=8, val=4)
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            deep = np.asarray(image.convert("L")).astype(np.uint16) * 16
        Image.fromarray(deep).save(path)
    flags = [*FLAGS, "--data_dir", str(folder), "--baseline", "--pixel_range", "0", "4080"]
    from kd.cli import experiment

    assert experiment(flags) == 0
    checkpoint = "logs/pets/baseline/version_0/checkpoints/best.ckpt"
    exported = tmp_path / "student.onnx"
    pytest.importorskip("onnxruntime")
    assert main(["export", checkpoint, "--output", str(exported)]) == 0
    splits = read_splits(folder, Layout(pixel_range=(0, 4080)))
    capsys.readouterr()
    recorded = np.load("logs/pets/baseline/version_0/validation.npz")
    best = json.loads(Path("logs/pets/baseline/version_0/metrics.json").read_text())
    for student in (checkpoint, str(exported)):
        assert open_student(student).metadata["pixel_range"] == [0, 4080]
        assert main(["predict", student, *map(str, splits.val.files), "--json"]) == 0
        decisions = [row["class"] for row in json.loads(capsys.readouterr().out)]
        correct = np.mean(
            [splits.classes[label] == decision for label, decision in zip(splits.val.strata, decisions, strict=True)]
        )
        assert correct == pytest.approx(best["best_val_acc"])
    assert len(recorded["labels"]) == len(splits.val)
    assert main(["evaluate", checkpoint, "--data_dir", str(folder), "--accelerator", "cpu"]) == 0
    assert f"{best['best_val_acc']:.2%}" in capsys.readouterr().out
