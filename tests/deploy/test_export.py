"""Exported students: the predictions of the checkpoint in every format, and with onnxruntime only."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from kd import load_student
from kd.cli import main
from kd.data import load_image, plain_view, read_splits
from kd.deploy import FORMATS, open_student
from kd.deploy.export import export_student, load_checkpoint_splits
from kd.deploy.loading import find_checkpoint
from kd.errors import UserError
from kd.models import CLASSIFIER_KEY, STATE_PREFIX, Classifier, Description, build_classifier, load_classifier
from kd.pixels import decode, square
from tests.conftest import MakeFolder
from tests.pipeline.test_experiment import run

READABLE = ("onnx", "safetensors")


@pytest.fixture
def checkpoint(make_folder: MakeFolder) -> Path:
    results, _ = run(make_folder(train=12), "--train_teacher", "--distill", "--name", "shipped")
    return Path(results.runs["distilled"][0]["checkpoint"])


def export(checkpoint: Path, output: str, *flags: str) -> int:
    return main(["export", str(checkpoint), "--output", output, *flags])


@pytest.mark.parametrize("file_format", list(FORMATS))
def test_an_exported_file_computes_the_logits_of_its_checkpoint(
    checkpoint: Path, tmp_path: Path, file_format: str
) -> None:
    file = tmp_path / "ship" / f"student{FORMATS[file_format]}"
    (exported_file,) = export_student(
        checkpoint, file, file_format=file_format, splits=load_checkpoint_splits(checkpoint)
    )
    assert exported_file.difference <= 1e-4
    assert (exported_file.agreement, exported_file.accuracy) == (1.0, exported_file.metadata["val_acc"])
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    if file_format == "torch":
        program = torch.export.load(file)
        with torch.no_grad():
            images = torch.rand(5, 3, *2 * [exported_file.metadata["image_size"]])
            torch.testing.assert_close(program.module()(images), load_classifier(checkpoint)(images))
        return
    student = open_student(file)
    classifier = load_classifier(checkpoint)
    assert student.metadata["classes"] == list(classifier.description.classes)
    assert student.metadata["mean"] == pytest.approx(classifier.description.mean)
    # Any batch size.
    for count in (1, 2, 5):
        images = torch.rand(count, 3, *2 * [classifier.description.image_size])
        with torch.no_grad():
            expected = classifier(images).numpy()
        np.testing.assert_allclose(student.logits(images.numpy()), expected, atol=1e-5)


def test_a_model_card_describes_the_exported_files(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, str(tmp_path / "student.onnx"), "--quantize", "int8") == 0
    out = capsys.readouterr().out
    assert "student.int8.onnx" in out
    card = (tmp_path / "student.md").read_text(encoding="utf-8")
    for words in ("distilled", "`ce=0.1` `kl=0.9`", "kd predict student.onnx", "student.int8.onnx", "ant, bee"):
        assert words in card
    assert f"{len(onnx.load(tmp_path / 'student.onnx').SerializeToString()) / 1e6:.2f} MB" in card


def test_a_quantized_file_mostly_agrees_with_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    full, quantized = export_student(
        checkpoint,
        tmp_path / "student.onnx",
        file_format="onnx",
        splits=load_checkpoint_splits(checkpoint),
        quantize=True,
    )
    assert quantized.path == tmp_path / "student.int8.onnx"
    assert ("quantized" in full.metadata, quantized.metadata["quantized"]) == (False, "int8")
    assert quantized.agreement >= 0.8
    operators = {node.op_type for node in onnx.load(quantized.path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


def test_a_file_with_different_logits_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.deploy.export.LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(
        UserError, match=r"student\.pt2: not written, as its logits differ from the checkpoint's by up to .*"
    ):
        export_student(
            checkpoint, tmp_path / "out" / "student.pt2", file_format="torch", splits=load_checkpoint_splits(checkpoint)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "flags", "words"),
    [
        ("student.pt", (), "the suffix must be .onnx for --format onnx"),
        (
            "student.pt2",
            ("--format", "torch", "--quantize", "int8"),
            "not available for --format torch; use --format onnx",
        ),
        ("student.onnx", ("--data_dir", "nowhere"), "nowhere"),
        ("student.onnx", ("--dataset", "digits"), "its classes are not those of digits"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_written(
    checkpoint: Path,
    tmp_path: Path,
    output: str,
    flags: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(checkpoint, str(tmp_path / output), *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / output).exists()


def test_a_checkpoint_outside_its_run_needs_data_dir(checkpoint: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(checkpoint, tmp_path / "alone.ckpt"))
    with pytest.raises(UserError, match=r"config\.yaml does not exist; name them with --data_dir"):
        load_checkpoint_splits(alone)
    assert len(load_checkpoint_splits(alone, data_dir=str(tmp_path / "photos")).val) > 0


def test_an_experiments_folder_stands_for_its_best_student(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (Path("logs/shipped"), Path("logs/shipped/distilled/version_0")):
        assert find_checkpoint(folder) == Path("logs/shipped/distilled/version_0/checkpoints/best.ckpt")
    assert find_checkpoint(Path("logs/shipped/teacher")).parts[-4:-2] == ("teacher", "version_0")
    assert main(["export", "logs/shipped", "--output", "student.safetensors", "--format", "safetensors"]) == 0
    assert main(["predict", "logs/shipped", str(tmp_path / "photos")]) == 0
    assert main(["evaluate", "logs/shipped", "--data_dir", str(tmp_path / "photos"), "--accelerator", "cpu"]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path), "--output", "student.onnx"]) == 2
    assert "no finished run in this folder; name an experiment (logs/NAME)" in capsys.readouterr().err


def test_a_student_is_exported_without_its_images(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copy(checkpoint, tmp_path / "alone.ckpt")
    assert main(["export", str(alone), "--output", "alone.onnx"]) == 0
    output = capsys.readouterr().out
    assert "note: verified on random images, as the validation images can't be read" in output
    assert "not measured" in output
    card = Path("alone.md").read_text()
    assert "Verified on 64 random images" in card
    assert "accuracy was not measured" in card
    student = open_student("alone.onnx")
    size = student.metadata["image_size"]
    images = np.random.default_rng(1).random((3, 3, size, size), dtype=np.float32)
    with torch.no_grad():
        expected = load_classifier(alone)(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(student.logits(images), expected, atol=1e-4)
    assert main(["export", str(alone), "--output", "alone.onnx", "--quantize", "int8"]) == 2
    assert main(["export", str(alone), "--output", "alone.onnx", "--data_dir", "nowhere"]) == 2


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(images.flatten(1))
        return logits if images.mean() > 0 else -logits


def write_checkpoint(network: nn.Module, code: Path, path: Path) -> str:
    """Write a checkpoint of a network from the user's code; return its name."""
    description = Description(f"{code}:net", ("ant", "bee"), 8, "crop", (0.5,) * 3, (0.5,) * 3)
    classifier = Classifier(network, description)
    state = {f"model.{name}": value for name, value in classifier.state_dict().items()}
    torch.save({"classifier": description.plain(), "state_dict": state}, path)
    return description.architecture


class FixedBatch(Untraceable):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.linear(image.flatten()) for image in images])


@pytest.mark.parametrize(
    ("network", "file_format", "reason"),
    [
        (Untraceable, "onnx", "torch.export can't trace"),
        (Untraceable, "torch", "torch.export can't trace"),
        (FixedBatch, "onnx", "tracing fixed the number of images per batch"),
        (FixedBatch, "torch", "torch.export can't trace"),
    ],
)
def test_a_network_that_can_not_be_traced_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], network: type[nn.Module], file_format: str, reason: str
) -> None:
    name = network.__name__
    (tmp_path / "own.py").write_text(
        f"from tests.deploy.test_export import {name}\n\n\ndef net():\n    return {name}()\n"
    )
    model = write_checkpoint(network(), tmp_path / "own.py", tmp_path / "u.ckpt")
    output = f"u{FORMATS[file_format]}"
    flags = ["--output", output, "--format", file_format, "--model", model]
    assert main(["export", str(tmp_path / "u.ckpt"), *flags]) == 2
    error = capsys.readouterr().err
    assert f"--format {file_format}: {reason}" in error
    assert "--format safetensors doesn't trace" in error
    assert not Path(output).exists()


def test_weights_beyond_the_limit_of_an_onnx_file_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kd.deploy.export._LARGEST_ONNX", 100)
    assert export(checkpoint, "student.onnx") == 2
    assert "an ONNX file holds at most" in capsys.readouterr().err
    assert not Path("student.onnx").exists()


def test_a_layer_under_two_names_is_exported_once(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.first = nn.Linear(192, 2)\n        self.second = self.first\n\n"
        "    def forward(self, images):\n        return self.second(images.flatten(1))\n\n\nnet = Net\n"
    )
    model = f"{tmp_path / 'own.py'}:net"
    classifier = build_classifier(model, classes=("ant", "bee"), image_size=8)
    state = {f"model.{name}": value for name, value in classifier.state_dict().items()}
    torch.save({"classifier": classifier.description.plain(), "state_dict": state}, tmp_path / "t.ckpt")
    file = tmp_path / "t.safetensors"
    export_student(tmp_path / "t.ckpt", file, file_format="safetensors", splits=None, model=model)
    with safe_open(file, framework="pt") as opened:
        assert len([name for name in opened.keys() if name.endswith("weight")]) == 1  # noqa: SIM118
    images = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    with torch.no_grad():
        expected = classifier.eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(open_student(file, model=model).logits(images), expected, atol=1e-6)


def test_images_are_resized_as_for_validation(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for width, height in ((60, 40), (40, 61), (33, 33), (20, 90)):
        file = tmp_path / f"{width}.png"
        coarse = Image.fromarray(generator.integers(0, 255, (6, 9, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file)
        for resize in ("crop", "squash"):
            view = plain_view(28, resize)(load_image(file)).float() / 255
            assert np.abs(square(decode(file), 28, resize) - view.numpy()).max() <= 2.01 / 255


def test_predictions_are_those_of_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint, str(tmp_path / "student.onnx"))
    capsys.readouterr()
    photos = str(tmp_path / "photos" / "val")
    outputs = []
    for student in (str(checkpoint), str(tmp_path / "student.onnx")):
        assert main(["predict", student, photos, "--json", "--top", "2"]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert [row["class"] for row in outputs[0]] == [row["class"] for row in outputs[1]]
    files = sorted((tmp_path / "photos" / "val").rglob("*.png"))
    assert [row["image"] for row in outputs[0]] == list(map(str, files))
    network, transform = load_student(checkpoint)
    with torch.no_grad():
        probabilities = network(transform(files[0])[None]).softmax(dim=1)[0]
    first = outputs[0][0]
    assert list(first["top"].values()) == pytest.approx(probabilities.topk(2).values.tolist(), abs=1e-5)
    assert first["class"] == transform.classes[int(probabilities.argmax())]
    assert not network.training


@pytest.mark.parametrize("file_format", READABLE)
def test_an_exported_file_is_evaluated_like_its_checkpoint(
    checkpoint: Path, tmp_path: Path, file_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / f"student{FORMATS[file_format]}")
    export(checkpoint, file, "--format", file_format)
    capsys.readouterr()
    tables = []
    for student in (str(checkpoint), file):
        assert main(["evaluate", student, "--data_dir", str(tmp_path / "photos")]) == 0
        tables.append(capsys.readouterr().out.splitlines())
    rows = [[line for line in lines if "accurac" in line or "accurate" in line] for lines in tables]
    assert len(rows[0]) == 3
    assert [row.split() for row in rows[0]] == [row.split() for row in rows[1]]


def test_a_broken_image_is_reported_and_the_others_are_predicted(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tmp_path / "photos" / "val" / "ant", folder)
    (folder / "broken.png").write_bytes(b"\x89PNG and no more")
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    assert main(["predict", str(checkpoint), str(folder), "--csv", "--top", "2", "--batch_size", "2"]) == 1
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 5
    assert list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    skipped, error = err.splitlines()
    assert skipped == f"note: skipped 1 file that is no image: {folder / 'notes.txt'}"
    assert error.startswith(f"error: {folder / 'broken.png'}: this image can't be decoded")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["nowhere.onnx", "."], "no such file"),
        (["{}", "nowhere"], "no such image or folder"),
        (["{}", "empty"], "no images found"),
        (["broken.onnx", "."], "onnxruntime can't read it"),
        (["broken.safetensors", "."], "not a safetensors file"),
        (["foreign.onnx", "."], "not a file of `kd export`"),
    ],
)
def test_a_mistake_in_predicting_is_reported(
    checkpoint: Path, line: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    for name in ("broken.onnx", "broken.safetensors"):
        Path(name).write_bytes(b"another format")
    node = onnx.helper.make_node("Identity", ["images"], ["logits"])
    tensors = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 3]) for name in ("images", "logits")
    ]
    graph = onnx.helper.make_graph([node], "g", tensors[:1], tensors[1:])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), "foreign.onnx"
    )
    assert main(["predict", *(part.format(checkpoint) for part in line)]) == 2
    assert words in capsys.readouterr().err


def test_an_onnx_file_cannot_be_loaded_as_a_module(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, str(tmp_path / "student.onnx"))
    with pytest.raises(UserError, match=r"an ONNX file can't be read as a torch\.nn\.Module"):
        load_student(tmp_path / "student.onnx")


def test_an_onnx_file_is_run_without_training_packages(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, str(tmp_path / "student.onnx"))
    hidden = "import sys\nfor name in ('torch', 'torchvision', 'pytorch_lightning', 'rich', 'tyro', 'cv2', 'yaml'):\n"
    hidden += "    sys.modules[name] = None\nfrom kd.__main__ import main\nsys.exit(main())"
    line = [sys.executable, "-c", hidden, "predict", "student.onnx", str(tmp_path / "photos" / "val"), "--json"]
    completed = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert len(json.loads(completed.stdout)) == 15


def test_an_invalid_number_is_refused_by_the_parser(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(checkpoint), ".", "--top", "0"])
    assert stop.value.code == 2
    assert "must be at least 1, not 0" in capsys.readouterr().err


def test_a_network_whose_logits_are_no_numbers_is_not_exported(tmp_path: Path, make_folder: MakeFolder) -> None:
    classifier = build_classifier("linear", classes=("ant", "bee", "cat"), image_size=8)
    for weight in classifier.parameters():
        weight.data.fill_(float("nan"))
    state = {STATE_PREFIX + name: value for name, value in classifier.state_dict().items()}
    torch.save({CLASSIFIER_KEY: classifier.description.plain(), "state_dict": state}, tmp_path / "x.ckpt")
    splits = read_splits(make_folder())
    output = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="not written, as its logits differ from the checkpoint's by up to nan"):
        export_student(tmp_path / "x.ckpt", output, file_format="safetensors", splits=splits)
    assert not output.exists()
