"""A teacher that another project trained is distilled and evaluated like one of our own."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kd.cli import experiment, main

SIZE = 16
COLORS = {"ant": (220, 40, 40), "bee": (40, 220, 40), "cat": (40, 40, 220)}
FLAGS = (
    f"--image_size {SIZE} --batch_size 8 --augment none --accelerator cpu --max_epochs 2 --name pets "
    "--student_model mlp"
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write noisy images in a color of their class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 12)):
        for name, color in COLORS.items():
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(np.array(color) + generator.normal(0, 20, (SIZE, SIZE, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "photos"


def color_network(order: list[str]) -> dict[str, torch.Tensor]:
    """Return the weights of kd's linear network that compares the color channels, with outputs in some order."""
    channel = {"ant": 0, "bee": 1, "cat": 2}
    weight = torch.zeros(len(order), 3, SIZE, SIZE)
    for output, name in enumerate(order):
        if name in channel:
            weight[output, channel[name]] = 1 / SIZE
    bias = torch.tensor([0.0 if name in channel else -9.0 for name in order])
    return {"1.weight": weight.flatten(1), "1.bias": bias}


def save(path: Path, order: list[str]) -> Path:
    torch.save({"state_dict": {f"module.{key}": value for key, value in color_network(order).items()}}, path)
    return path


def distill(photos: Path, teacher: Path, *more: str) -> int:
    flags = [*FLAGS.split(), "--distill", "--data_dir", str(photos), "--teacher_checkpoint", str(teacher), *more]
    return experiment(flags if "--teacher_model" in more else [*flags, "--teacher_model", "linear"])


def test_the_networks_layers_are_named_as_assumed_here() -> None:
    from kd.models.small import linear

    network: nn.Module = linear(3, SIZE)
    assert set(network.state_dict()) == set(color_network(["ant", "bee", "cat"]))


def test_a_state_dict_with_more_classes_in_another_order_teaches(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ["cat", "dog", "ant", "bee"]
    (tmp_path / "names.txt").write_text("\n".join(order))
    teacher = save(tmp_path / "their.pth", order)
    assert distill(photos, teacher, "--teacher_classes", str(tmp_path / "names.txt")) == 0
    output = capsys.readouterr().out
    assert "the teacher knows 4 classes: its predictions are restricted to the 3 of photos" in output
    assert "teacher linear · validation accuracy 100.0%" in output
    phase = json.loads(Path("logs/pets/summary.json").read_text())["phases"]["teacher"]
    assert phase["val_acc_mean"] == 1
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert phase["provenance"]["teacher"] == {"teacher file": str(teacher), "SHA-256": digest}
    assert digest in Path("logs/pets/report.html").read_text()


def test_a_shuffled_class_list_is_noticed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = save(tmp_path / "their.pth", ["cat", "ant", "bee"])
    assert distill(photos, teacher) == 2
    captured = capsys.readouterr()
    assert "their.pth doesn't name its classes: assumed to be the data's, in alphabetical order" in captured.out
    assert "validation accuracy 0.0%" in captured.out
    assert "no better than chance" in captured.err


def test_a_wrong_normalization_is_noticed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Right only for pixels from 0 to 1: a threshold on the red channel, in its mean over the image.
    weights = color_network(["ant", "bee", "cat"])
    weights["1.bias"] = torch.tensor([0.0, 0.0, 0.0])
    torch.save(weights, tmp_path / "their.pth")
    wrong = ["--teacher_mean", "0.9", "0.1", "0.1", "--teacher_std", "1", "1", "1"]
    assert distill(photos, tmp_path / "their.pth", *wrong, "--allow_weak_teacher") == 0
    output = capsys.readouterr().out
    assert "warning: the teacher's normalization may be wrong: with --teacher_mean" in output
    assert "its accuracy is 100.0% on 36 images" in output


def test_other_classes_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("dog\nelk\nfox\n")
    teacher = save(tmp_path / "their.pth", ["ant", "bee", "cat"])
    assert distill(photos, teacher, "--teacher_classes", str(tmp_path / "names.txt")) == 2
    assert "only the teacher has dog, elk, fox; only photos has ant, bee, cat" in capsys.readouterr().err


def test_evaluate_measures_weights_of_another_project(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save(tmp_path / "their.pth", ["ant", "bee", "cat"])
    command = ["evaluate", str(teacher), "--data_dir", str(photos), "--image_size", str(SIZE), "--accelerator", "cpu"]
    assert main(command) == 2
    assert "their.pth: doesn't name its network; add --model NAME" in capsys.readouterr().err
    assert main([*command, "--model", "linear"]) == 0
    assert re.search(r"accuracy\W+100\.00%", capsys.readouterr().out)


@pytest.mark.parametrize("suffix", ["onnx", "safetensors"])
def test_exported_files_teach(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    pytest.importorskip("onnxruntime")
    trained = ["--baseline", "--learning_rate", "0.01", "--max_epochs", "20", "--name", "first"]
    assert experiment([*FLAGS.split()[:-6], *trained, "--student_model", "mlp", "--data_dir", str(photos)]) == 0
    checkpoint = "logs/first/baseline/version_0/checkpoints/best.ckpt"
    exported = tmp_path / f"teacher.{suffix}"
    assert main(["export", checkpoint, "--output", str(exported), "--format", suffix]) == 0
    capsys.readouterr()
    assert distill(photos, exported, "--teacher_model", "mlp") == 0
    assert "teacher mlp · validation accuracy 100.0%" in capsys.readouterr().out


def test_students_and_teachers_start_from_weights_in_a_file(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "their.pth", ["ant", "bee", "cat"])
    flags = [*FLAGS.split()[:-4], "--data_dir", str(photos), "--learning_rate", "1e-6", "--mixup", "0", "--baseline"]
    start = ["--student_model", "linear", "--student_pretrained", str(tmp_path / "their.pth")]
    assert experiment([*flags, *start, "--name", "started"]) == 0
    record = json.loads(Path("logs/started/baseline/version_0/metrics.json").read_text())
    assert record["val_acc"] == 1
    digest = hashlib.sha256((tmp_path / "their.pth").read_bytes()).hexdigest()
    assert record["provenance"]["settings"]["student_pretrained"] == f"file with SHA-256 {digest}"
    # Other classes: the classifier layer is new, the only one of this network.
    save(tmp_path / "other.pth", ["ant", "bee", "cat", "dog"])
    start[-1] = str(tmp_path / "other.pth")
    assert experiment([*flags, *start, "--name", "new"]) == 0
    record = json.loads(Path("logs/new/baseline/version_0/metrics.json").read_text())
    assert record["val_acc"] < 1
    capsys.readouterr()
    start[1] = "mlp"
    assert experiment([*flags, *start]) == 2
    assert "--student_pretrained " in (error := capsys.readouterr().err)
    assert "other.pth: its weights don't fit mlp" in error
