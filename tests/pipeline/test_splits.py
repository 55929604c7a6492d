"""Experiments on divided images, with test images, and judged by other metrics than accuracy."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from kd.cli import experiment, main
from kd.report.measures import Predictions, measure
from tests.conftest import MakeFolder

FLAGS = [
    *("--image_size", "8", "--batch_size", "8", "--augment", "none", "--accelerator", "cpu", "--max_epochs", "2"),
    *("--image_cache", "none", "--teacher_model", "mlp", "--student_model", "linear", "--learning_rate", "0.01"),
    *("--name", "pets"),
]


def write_folder(folder: Path, counts: dict[str, int]) -> Path:
    """Write noisy images of some brightness by class, into class folders without splits."""
    generator = np.random.default_rng(0)
    for level, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(80 + 60 * level + generator.normal(0, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def summary() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("logs/pets/summary.json").read_text())
    return content


def test_one_folder_is_divided_once_and_measured_on_test_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "photos", {"ant": 40, "bee": 40})
    flags = [*FLAGS, "--data_dir", str(folder), "--val_fraction", "0.2", "--test_fraction", "0.3"]
    flags += ["--train_teacher", "--baseline", "--distill", "--seeds", "2", "--allow_weak_teacher"]
    assert experiment(flags) == 0
    output = capsys.readouterr().out
    assert "photos: 40 training and 16 validation images, 2 classes" in output
    assert "test accuracy" in output
    recorded = Path("logs/pets/split.csv").read_text()
    assert Counter(line.split(",")[2] for line in recorded.splitlines()[1:]) == {"train": 40, "val": 16, "test": 24}
    found = summary()
    assert found["metric"] == {"name": "accuracy", "title": "test accuracy", "split": "test"}
    for facts in found["phases"].values():
        for run in facts["runs"]:
            predictions = Predictions.read(Path("logs/pets") / run["test"])
            assert predictions is not None
            assert len(predictions) == 24
            assert run["score"] == run["test_acc"] == pytest.approx(measure(predictions)["accuracy"])
        mean = np.mean([run["test_acc"] for run in facts["runs"]])
        assert facts["score_mean"] == pytest.approx(mean)
    by_seed = [[run["test_acc"] for run in found["phases"][phase]["runs"]] for phase in ("baseline", "distilled")]
    assert found["gain"]["mean"] == pytest.approx(np.mean(np.subtract(by_seed[1], by_seed[0])))
    assert "test accuracy" in Path("logs/pets/report.md").read_text()
    # The checkpoint's own images are found again, and with another seed the division stays.
    checkpoint = "logs/pets/distilled/version_0/checkpoints/best.ckpt"
    pytest.importorskip("onnxruntime")
    assert main(["export", checkpoint, "--output", str(tmp_path / "x.onnx")]) == 0
    assert "16 validation images" in capsys.readouterr().out
    assert experiment([*flags, "--seed", "7", "--seeds", "1"]) == 0
    assert Path("logs/pets/split.csv").read_text() == recorded


def test_test_images_may_be_added_to_a_finished_experiment(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(train=8, val=6)
    flags = [*FLAGS, "--data_dir", str(folder), "--baseline", "--resume"]
    assert experiment(flags) == 0
    assert summary()["metric"]["split"] == "validation"
    shutil.copytree(folder / "val", folder / "test")
    capsys.readouterr()
    assert experiment([*flags, "--test_data", "test"]) == 0
    assert "already finished" in capsys.readouterr().out
    run = summary()["phases"]["baseline"]["runs"][0]
    # The same images: the test accuracy is that of the best epoch.
    assert run["test_acc"] == run["best_val_acc"]
    record = json.loads(Path("logs/pets/baseline/version_0/metrics.json").read_text())
    assert record["test_images"].startswith("18 images in 3 classes")
    # Other test images are measured anew.
    shutil.rmtree(folder / "test")
    shutil.copytree(folder / "train", folder / "test")
    assert experiment([*flags, "--test_data", "test"]) == 0
    record = json.loads(Path("logs/pets/baseline/version_0/metrics.json").read_text())
    assert record["test_images"].startswith("24 images in 3 classes")


def test_uneven_classes_are_judged_by_balanced_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "photos", {"ant": 100, "bee": 10})
    flags = [*FLAGS, "--data_dir", str(folder), "--val_fraction", "0.3", "--baseline", "--max_epochs", "4"]
    assert experiment(flags) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "--metric auto: balanced_accuracy, as the classes of the validation images are uneven" in output
    assert "training images by class are uneven: from 7 (bee) to 70 (ant)" in output
    assert "always predicting the most frequent one has an accuracy of 90.91%" in output
    record = json.loads(Path("logs/pets/baseline/version_0/metrics.json").read_text())
    by_epoch = [epoch["val/balanced_accuracy"] for epoch in record["history"]]
    assert (record["metric"], record["score"], record["best_score"]) == (
        "balanced_accuracy",
        by_epoch[-1],
        max(by_epoch),
    )
    predictions = Predictions.read(record["validation"])
    assert predictions is not None
    assert record["score"] == pytest.approx(measure(predictions)["balanced_accuracy"])
    assert summary()["metric"]["title"] == "balanced accuracy"
    assert record["provenance"]["settings"]["metric"] == "balanced_accuracy"


@pytest.mark.parametrize("metric", ["macro_f1", "auroc"])
def test_other_metrics_agree_with_those_of_the_predictions(tmp_path: Path, metric: str) -> None:
    folder = write_folder(tmp_path / "photos", {"ant": 20, "bee": 12, "cat": 30})
    flags = [*FLAGS, "--data_dir", str(folder), "--val_fraction", "0.4", "--baseline", "--metric", metric]
    assert experiment(flags) == 0
    record = json.loads(Path("logs/pets/baseline/version_0/metrics.json").read_text())
    predictions = Predictions.read(record["validation"])
    assert predictions is not None
    assert record["score"] == pytest.approx(measure(predictions)[metric], abs=1e-6)


def test_metrics_are_over_the_classes_present(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(train=8, val=6)
    shutil.rmtree(folder / "val" / "bee")
    flags = [*FLAGS, "--data_dir", str(folder), "--baseline", "--metric", "balanced_accuracy"]
    assert experiment(flags) == 2
    assert "add --allow_missing_classes" in capsys.readouterr().err
    assert experiment([*flags, "--allow_missing_classes"]) == 0
    output = capsys.readouterr().out
    assert "classes without validation images: bee; metrics are over the others" in output
    record = json.loads(Path("logs/pets/baseline/version_0/metrics.json").read_text())
    with np.load(record["validation"]) as file:
        decisions, labels = file["logits"].argmax(axis=1), file["labels"]
    expected = np.mean([np.mean(decisions[labels == label] == label) for label in (0, 2)])
    assert record["score"] == pytest.approx(expected)


def test_a_table_of_images_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "photos", {"ant": 12, "bee": 12})
    rows = [
        f"{path.relative_to(folder)},{path.parent.name},{'val' if int(path.stem) % 3 == 0 else 'train'}"
        for path in sorted(folder.rglob("*.png"))
    ]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file,class,split", *rows]))
    flags = [*FLAGS, "--data_dir", str(folder), "--train_data", str(table), "--baseline"]
    assert experiment(flags) == 0
    assert "16 training and 8 validation images, 2 classes" in capsys.readouterr().out
    table.write_text("\n".join(["file,class,split", *rows, "absent.png,ant,train"]))
    assert experiment(flags) == 2
    assert "line 26: there is no file absent.png" in capsys.readouterr().err
    config = yaml.safe_load(Path("logs/pets/config.yaml").read_text())
    assert config["train_data"] == str(table)


def test_images_of_more_than_8_bits_are_scaled_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "photos", {"ant": 8, "bee": 8})
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            deep = np.asarray(image.convert("L")).astype(np.uint16) * 16
        Image.fromarray(deep).save(path)
    flags = [*FLAGS, "--data_dir", str(folder), "--val_fraction", "0.5", "--baseline", "--pixel_range", "0", "4080"]
    assert experiment(flags) == 0
    output = capsys.readouterr().out
    assert "images that are 16-bit: 16" in output
    record = json.loads(Path("logs/pets/baseline/version_0/metrics.json").read_text())
    assert record["provenance"]["settings"]["pixel_range"] == [0, 4080]
    assert experiment([*flags[:-2], "4080", "0"]) == 2
    assert "--pixel_range 4080 0: two gray values, the smaller one first" in capsys.readouterr().err


def test_a_student_is_distilled_on_unlabeled_images_alone(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(train=8, val=6)
    flags = [*FLAGS, "--data_dir", str(folder)]
    assert experiment([*flags, "--train_teacher", "--max_epochs", "6"]) == 0
    teacher = "logs/pets/teacher/version_0/checkpoints/best.ckpt"
    # The training images are there without their labels.
    unlabeled = tmp_path / "unlabeled"
    unlabeled.mkdir()
    for path in (folder / "train").rglob("*.png"):
        shutil.copy(path, unlabeled / f"{path.parent.name}-{path.name}")
    shutil.rmtree(folder / "train")
    more = ["--teacher_checkpoint", teacher, "--unlabeled_data", str(unlabeled), "--name", "alone", "--augment", "crop"]
    capsys.readouterr()
    assert experiment([*flags, *more, "--distill", "--max_epochs", "8"]) == 0
    output = capsys.readouterr().out
    assert "0 training and 18 validation images, 3 classes" in output
    assert "classes without training images" not in output
    run = json.loads(Path("logs/alone/summary.json").read_text())["phases"]["distilled"]["runs"][0]
    assert run["agreement"] > 0.5
    assert experiment([*flags, *more, "--distill", "--baseline"]) == 2
    assert "--baseline: there are no labeled training images" in capsys.readouterr().err
    assert experiment([*flags, "--train_teacher", "--unlabeled_data", str(unlabeled)]) == 2
    assert "train: there is no such folder" in capsys.readouterr().err
