"""Several labels an image: two digits side by side, of which each is a class."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, f1_score

from kd.cli import experiment, main
from kd.data import Layout, read_splits
from kd.losses import BinaryCrossEntropy, BinaryKL, build_objective
from kd.metrics import best_thresholds, multilabel_scores
from kd.models import load_classifier
from kd.report.measures import Predictions, measure

FLAGS = [
    *("--image_size", "16", "--batch_size", "32", "--augment", "none", "--resize", "squash", "--accelerator", "cpu"),
    *("--image_cache", "none", "--teacher_model", "convnet(widths=[16,32])", "--student_model", "mlp(hidden=[32])"),
    *("--learning_rate", "0.01", "--name", "pairs", "--multilabel"),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of two digits from 0 to 4 side by side, and a table of their labels; some show none."""
    folder, digits = tmp_path_factory.mktemp("pairs"), load_digits()
    small = np.flatnonzero(digits.target < 5)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(420):
        first, second = generator.choice(small, 2)
        pixels = np.hstack([digits.images[first], digits.images[second]]) * 15
        names = sorted({str(digits.target[first]), str(digits.target[second])})
        if number % 20 == 0:
            pixels, names = np.zeros((8, 16)), []
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append((f"{number}.png", "|".join(names), "val" if number % 3 == 0 else "train"))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "labels", "split"), *rows])
    return folder


def flags_for(pairs: Path, *more: str) -> list[str]:
    return [*FLAGS, "--data_dir", str(pairs), "--train_data", "labels.csv", *more]


def test_scores_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    targets = (generator.random((60, 4)) < (0.2, 0.5, 0.7, 0.0)).astype(float)
    logits = generator.normal(size=(60, 4)) + targets
    found = multilabel_scores(torch.tensor(logits), torch.tensor(targets))
    areas = [average_precision_score(targets[:, column], logits[:, column]) for column in range(3)]
    assert found["map"] == pytest.approx(np.mean(areas), abs=1e-5)
    assert found["average_precision"] == [*(pytest.approx(area, abs=1e-5) for area in areas), None]
    decided = logits > 0
    assert found["micro_f1"] == pytest.approx(f1_score(targets, decided, average="micro"), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(targets[:, :3], decided[:, :3], average="macro"), abs=1e-6)
    assert found["accuracy"] == pytest.approx((decided == (targets > 0)).all(axis=1).mean())
    assert found["support"] == targets.sum(axis=0).tolist()


def test_thresholds_give_the_best_f1_score() -> None:
    generator = np.random.default_rng(1)
    targets = (generator.random((50, 3)) < (0.1, 0.6, 0.0)).astype(float)
    logits = generator.normal(size=(50, 3)).round(1) + 0.7 * targets
    thresholds = best_thresholds(torch.tensor(logits), torch.tensor(targets))
    probabilities = 1 / (1 + np.exp(-logits))
    for column in range(2):
        scores = [
            f1_score(targets[:, column], probabilities[:, column] >= cut) for cut in np.unique(probabilities[:, column])
        ]
        found = f1_score(targets[:, column], probabilities[:, column] >= thresholds[column])
        assert found == pytest.approx(max(scores))
    assert thresholds[2] == 0.5


def test_losses_are_those_of_two_classes_each() -> None:
    generator = torch.Generator().manual_seed(0)
    z, v = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)
    labels = (torch.rand(6, 3, generator=generator) > 0.5).float()

    def pair(logits: torch.Tensor) -> torch.Tensor:
        return torch.stack([logits.flatten(), torch.zeros(18)], dim=1)

    expected = build_objective("ce").terms[0].loss(pair(z), pair(z), (1 - labels).flatten().long())  # type: ignore[operator]
    torch.testing.assert_close(BinaryCrossEntropy()(z, v, labels), expected)
    for temperature in (1.0, 3.0):
        softened = build_objective(f"kl(temperature={temperature})").terms[0].loss
        expected = softened(pair(z), pair(v), torch.zeros(18).long())  # type: ignore[operator]
        torch.testing.assert_close(BinaryKL(temperature)(z, v, labels), expected)
    assert float(BinaryKL()(v, v, labels)) == pytest.approx(0, abs=1e-7)
    huge = torch.full((2, 3), 500.0, requires_grad=True)
    BinaryKL()(huge, -huge.detach(), labels[:2]).backward()
    assert huge.grad is not None
    assert huge.grad.isfinite().all()


@pytest.mark.parametrize("form", ["lists", "separated", "columns", "repeated rows"])
def test_every_form_of_labels_is_read_alike(tmp_path: Path, form: str) -> None:
    labels = {"a.png": ("cat", "dog"), "b.png": ("dog",), "c.png": ()}
    for name in labels:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    layout, table = Layout(multilabel=True, val_fraction=0.5), tmp_path / "x.csv"
    if form == "lists":
        table = tmp_path / "x.jsonl"
        table.write_text("\n".join(json.dumps({"path": name, "label": list(each)}) for name, each in labels.items()))
    elif form == "columns":
        rows = [f"{name},{int('dog' in each)},{int('cat' in each)}" for name, each in labels.items()]
        table.write_text("\n".join(["path,dog,cat", *rows]))
        layout = Layout(label_column=("cat", "dog"), val_fraction=0.5)
    elif form == "separated":
        table.write_text("\n".join(["path,label", *(f"{name},{' ; '.join(each)}" for name, each in labels.items())]))
    else:
        rows = [f"{name},{label}" for name, each in labels.items() for label in each or ("",)]
        table.write_text("\n".join(["path,label", *rows]))
    images = read_splits(None, Layout(**vars(layout) | {"train_data": str(table)})).train
    assert images.multilabel
    assert dict(zip(images.keys, images.labels, strict=True)) == {"a.png": (0, 1), "b.png": (1,), "c.png": ()}
    assert images.targets([0, 1, 2]).tolist() == [[1, 1], [0, 1], [0, 0]]
    assert images.class_counts() == [1, 2]
    assert images.strata == [0, 1, -1]


def test_teacher_baseline_and_student_are_trained_and_shipped(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    flags = flags_for(pairs, "--train_teacher", "--baseline", "--distill", "--max_epochs", "12", "--seeds", "2")
    assert experiment(flags) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "several labels an image: --loss bce=0.1 binary_kl=0.9, --baseline_loss bce=1" in output
    assert re.search(r"teacher convnet\S+ · validation mAP \d+\.\d%", output)
    assert re.search(r"(improved|reduced) mAP by|No significant difference: \S+ points of mAP", output)
    summary = json.loads(Path("logs/pairs/summary.json").read_text())
    assert summary["metric"] == {"name": "map", "title": "mAP", "split": "validation"}
    for facts in summary["phases"].values():
        for run in facts["runs"]:
            predictions = Predictions.read(Path("logs/pairs") / run["validation"])
            assert predictions is not None
            assert predictions.multilabel
            assert run["score"] == pytest.approx(measure(predictions)["map"], abs=1e-5)
            assert run["score"] > 0.8
    report = Path("logs/pairs/report.md").read_text()
    assert "| network | mAP | micro F1 | macro F1 | exact match |" in report
    assert "average precision" in report
    # The student, its thresholds, and its exported file.
    checkpoint = "logs/pairs/distilled/version_0/checkpoints/best.ckpt"
    description = load_classifier(checkpoint).description
    assert description.multilabel
    assert len(description.thresholds) == 5
    assert len(set(description.thresholds)) > 1
    assert main(["export", checkpoint, "--output", str(tmp_path / "student.onnx"), "--quantize", "int8"]) == 0
    assert "sigmoid of each logit" in (tmp_path / "student.md").read_text()
    capsys.readouterr()
    answers = []
    for student in (checkpoint, str(tmp_path / "student.onnx")):
        assert main(["predict", student, str(pairs / "labels.csv"), "--json"]) == 0
        answers.append({Path(row["image"]).name: row["classes"] for row in json.loads(capsys.readouterr().out)})
    assert answers[0] == answers[1]
    with (pairs / "labels.csv").open() as file:
        wanted = {row["path"]: set(row["labels"].split("|")) - {""} for row in csv.DictReader(file)}
    right = [answers[0][name] == sorted(labels) for name, labels in wanted.items()]
    assert np.mean(right) > 0.6
    assert main(["predict", checkpoint, str(pairs / "0.png"), str(pairs / "1.png"), "--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert rows[0]["decision"] == ""
    evaluate = ["evaluate", checkpoint, "--val_data", str(pairs / "labels.csv"), "--accelerator", "cpu"]
    assert main(evaluate) == 2
    assert "if an image may have several labels, or none, add --multilabel" in capsys.readouterr().err
    assert main([*evaluate, "--multilabel"]) == 0
    assert re.search(r"mAP\W+\d+\.\d+%", capsys.readouterr().out)


def test_unlabeled_images_assistants_and_several_teachers_teach_several_labels(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_for(pairs, "--train_teacher", "--distill", "--max_epochs", "3", "--train_fraction", "0.3")
    flags += ["--unlabeled_rest", "--assistants", "mlp(hidden=[48])", "--allow_weak_teacher"]
    flags += ["--teacher_model", "convnet(widths=[16,32])", "convnet(widths=[8,16])"]
    assert experiment([*flags, "--loss", "bce=0.5", "binary_kl(temperature=2)=0.5", "hint=0.01"]) == 2
    assert "features are compared with those of one teacher" in capsys.readouterr().err
    assert experiment([*flags, "--loss", "bce=0.5", "binary_kl(temperature=2)=0.5"]) == 0
    phases = json.loads(Path("logs/pairs/summary.json").read_text())["phases"]
    assert set(phases) == {
        *("teacher", "teacher/convnet_widths_16_32", "teacher/convnet_widths_8_16"),
        *("assistant/1-mlp_hidden_48", "distilled"),
    }
    assert all(run["score"] > 0 for facts in phases.values() for run in facts["runs"])


def test_an_interrupted_experiment_is_resumed_to_the_same_result(pairs: Path) -> None:
    flags = flags_for(pairs, "--baseline", "--max_epochs", "2", "--schedule", "constant", "--resume")
    states = []
    for name, steps in (("whole", ("2",)), ("cut", ("1", "2"))):
        for epochs in steps:
            assert experiment([*flags, "--max_epochs", epochs, "--name", name]) == 0
        states.append(torch.load(f"logs/{name}/baseline/version_0/checkpoints/last.ckpt")["state_dict"])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


REFUSED: dict[str, tuple[list[str], str]] = {
    "a softmax loss": (["--loss", "kl=1", "--distill", "--train_teacher"], "kl needs one label an image; with several"),
    "cross-entropy": (["--baseline_loss", "focal=1"], "--baseline_loss: focal needs one label an image"),
    "mixing": (["--mixup", "0.2"], "--mixup 0.2: is for one label an image"),
    "a sampler": (["--sampler", "balanced"], "--sampler balanced: is for one label an image"),
    "class weights": (["--class_weights", "balanced"], "--class_weights balanced: is for one label an image"),
    "another metric": (["--metric", "balanced_accuracy"], "--metric balanced_accuracy: is for one label an image"),
    "folders": (["--train_data", "."], "--multilabel needs a table of images and their labels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_one_label_an_image_is_refused(pairs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = REFUSED[name]
    assert experiment(flags_for(pairs, *flags)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_losses_of_several_labels_are_refused_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    flags: list[Any] = ["--dataset", "digits", "--image_size", "8", "--accelerator", "cpu", "--student_model", "linear"]
    assert experiment([*flags, "--baseline_loss", "bce=1"]) == 2
    assert "bce is for several labels an image (--multilabel)" in capsys.readouterr().err
    assert experiment([*flags, "--metric", "map"]) == 2
    assert "--metric map: is for several labels an image" in capsys.readouterr().err


def test_a_teacher_that_knows_nothing_is_refused(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_for(pairs, "--train_teacher", "--distill", "--max_epochs", "1", "--teacher_learning_rate", "1e-9")
    assert experiment([*flags, "--teacher_model", "linear"]) == 2
    assert "no better than chance" in capsys.readouterr().err
