"""A teacher that another project trained is distilled and evaluated like one of our own."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kd import registry
from kd.cli import experiment, main
from kd.models import build_classifier

SIZE = 16
COLORS = {"ant": (220, 40, 40), "bee": (40, 220, 40), "cat": (40, 40, 220)}
EVALUATE = ["--image_size", str(SIZE), "--accelerator", "cpu"]
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


def flags_with(*more: str) -> list[str]:
    """Return the common flags but those that are given."""
    words = iter(FLAGS.split())
    return [word for flag, value in zip(words, words, strict=True) if flag not in more for word in (flag, value)]


def distill(photos: Path, teacher: Path, *more: str) -> int:
    flags = [*flags_with(*more), "--distill", "--data_dir", str(photos), "--teacher_checkpoint", str(teacher), *more]
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


OWN_CODE = """
import torch
from torch import nn


def bright(num_classes):
    # Compares the means of the color channels.
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
    network[2].weight.data = torch.eye(3)
    network[2].bias.data.zero_()
    return network


def embedding():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())


def frozen(num_classes):
    return bright(num_classes).requires_grad_(False)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN_CODE)
    return path


def phases(name: str = "pets") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"logs/{name}/summary.json").read_text())["phases"]
    return found


def test_the_users_code_that_loads_its_weights_teaches_without_a_file(
    photos: Path, code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS.split(), "--distill", "--data_dir", str(photos), "--teacher_model", f"{code}:bright"]
    assert experiment(flags) == 2
    assert "no teacher found" in capsys.readouterr().err
    assert experiment([*flags, "--teacher_checkpoint", "none"]) == 0
    assert "bright · validation accuracy 100.0%" in capsys.readouterr().out
    teacher = phases()["teacher"]
    digest = hashlib.sha256(code.read_bytes()).hexdigest()
    assert teacher["provenance"]["teacher"] == {"teacher file": str(code), "SHA-256": digest}
    assert teacher["cost"]["parameters"] == 12
    assert main(["evaluate", "none", "--model", f"{code}:bright", *EVALUATE, "--data_dir", str(photos)]) == 0
    assert "100.00%" in capsys.readouterr().out


def test_frozen_networks_are_refused(photos: Path, code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS.split()[:-2], "--data_dir", str(photos), "--student_model", f"{code}:frozen"]
    assert experiment(flags) == 2
    assert "all its weights are frozen (requires_grad is False): there is nothing to train" in capsys.readouterr().err


def test_fine_tuned_weights_come_before_published_ones(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save(tmp_path / "their.pth", ["ant", "bee", "cat"])
    flags = [*FLAGS.split(), "--data_dir", str(photos), "--teacher_model", "linear"]
    assert experiment([*flags, "--train_teacher"]) == 0
    scratch = "logs/pets/teacher/version_0"
    capsys.readouterr()
    # The teacher that was trained from scratch isn't the one asked for.
    pretrained = ["--teacher_pretrained", str(weights)]
    assert experiment([*flags, *pretrained, "--distill"]) == 0
    assert f"teacher checkpoint: {weights}" in capsys.readouterr().out
    assert experiment([*flags, *pretrained, "--train_teacher"]) == 0
    capsys.readouterr()
    assert experiment([*flags, *pretrained, "--distill"]) == 0
    assert "teacher checkpoint: logs/pets/teacher/version_1" in capsys.readouterr().out
    assert experiment([*flags, "--distill", "--teacher_pretrained"]) == 2
    assert "there are no published weights for linear" in capsys.readouterr().err
    assert Path(scratch).is_dir()


def test_a_teacher_of_features_alone_teaches(photos: Path, code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ["--teacher_model", f"{code}:embedding", "--teacher_checkpoint", "none", "--teacher_features"]
    flags = [*FLAGS.split()[:-1], "simple", "--distill", "--baseline", "--data_dir", str(photos), *teacher]
    assert experiment(flags) == 2
    assert "--loss kl: compares predictions, but --teacher_features leaves the teacher" in capsys.readouterr().err
    assert experiment([*flags, "--loss", "ce=0.5", "embedding=0.5"]) == 0
    output = capsys.readouterr().out
    assert "embedding · features only: it has no accuracy" in output
    assert "Distillation changed accuracy by" in output
    assert set(phases()) == {"baseline", "distilled"}
    # Labels aren't needed.
    flags[flags.index("--name") + 1] = "alone"
    assert experiment([*flags, "--loss", "embedding(distance=mse)"]) == 0
    assert set(phases("alone")) == {"baseline", "distilled"}


def test_simkd_gives_one_plain_network(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    flags = [*FLAGS.split()[:-1], "simple", "--train_teacher", "--distill", "--data_dir", str(photos)]
    flags += ["--teacher_model", "convnet(widths=[8,16])", "--loss", "simkd=1", "--ema", "0.9", "--allow_weak_teacher"]
    assert experiment(flags) == 0
    checkpoint = "logs/pets/distilled/version_0/checkpoints/last.ckpt"
    accuracy = phases()["distilled"]["val_acc_mean"]
    capsys.readouterr()
    assert main(["evaluate", checkpoint, "--data_dir", str(photos), "--accelerator", "cpu"]) == 0
    assert f"{accuracy:.2%}" in capsys.readouterr().out
    assert main(["export", checkpoint, "--output", "student.onnx", "--data_dir", str(photos)]) == 0
    assert re.search(r"student.onnx.*100\.00%", capsys.readouterr().out)


def store_logits(photos: Path, teacher: Path, *more: str) -> None:
    described = ["--model", "linear", "--image_size", str(SIZE), "--classes", str(teacher.with_name("names.txt"))]
    teacher.with_name("names.txt").write_text("ant\nbee\ncat\n")
    assert main(["predict", str(teacher), str(photos), *described, *more]) == 0


def rewrite(table: Path, suffix: str, photos: Path) -> Path:
    """Write a table of logits as other projects may, by path and without the hashes of the images."""
    target = table.with_suffix(suffix)
    with np.load(table) as file:
        names, logits = file["keys"].tolist(), file["logits"]
    if suffix == ".safetensors":
        save_file = pytest.importorskip("safetensors.numpy").save_file
        save_file({"logits": logits}, target, {"keys": json.dumps(names)})
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        paths = [str(photos / name) for name in names]
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.table({"path": paths, "logits": list(logits)}), target
        )
    return target


def assert_same_weights(first: str, second: str) -> None:
    """Compare the distilled students of two experiments."""
    live, stored = (
        torch.load(f"logs/{name}/distilled/version_0/checkpoints/last.ckpt")["state_dict"] for name in (first, second)
    )
    for key, value in live.items():
        torch.testing.assert_close(stored[key], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_stored_logits_teach_as_the_teacher_itself(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    teacher = save(tmp_path / "their.pth", ["ant", "bee", "cat"])
    store_logits(photos, teacher, "--logits", str(tmp_path / "logits.npz"))
    assert distill(photos, teacher, "--name", "live") == 0
    table = rewrite(tmp_path / "logits.npz", suffix, photos)
    assert distill(photos, table, "--name", "stored") == 0
    assert f"teacher logits{suffix} · validation accuracy 100.0%" in capsys.readouterr().out
    assert_same_weights("live", "stored")


def test_stored_logits_of_mirrored_images_teach_flipped_views(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, table = save(tmp_path / "their.pth", ["ant", "bee", "cat"]), tmp_path / "logits.npz"
    store_logits(photos, teacher, "--logits", str(table), "--flip")
    for name, file in (("live", teacher), ("stored", table)):
        assert distill(photos, file, "--augment", "flip", "--name", name) == 0
    assert_same_weights("live", "stored")


def test_stored_logits_that_can_not_teach_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, table = save(tmp_path / "their.pth", ["ant", "bee", "cat"]), tmp_path / "logits.npz"
    store_logits(photos, teacher, "--logits", str(table))
    capsys.readouterr()

    def refusal(*flags: str) -> str:
        assert distill(photos, table, *flags) == 2
        return capsys.readouterr().err

    assert "fixed views, but --augment crop makes new ones; use --augment none or flip" in refusal("--augment", "crop")
    assert "fixed views, but --mixup or --cutmix makes new ones" in refusal("--mixup", "0.2")
    assert "has no logits of mirrored images for --augment flip" in refusal("--augment", "flip")
    assert "stored logits need none; leave it out" in refusal("--teacher_image_size", "8")
    # An image that has changed since is another one.
    changed = photos / "train" / "ant" / "3.png"
    Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).save(changed)
    assert f"has no logits for 1 of the 24 training images, such as {changed}" in refusal()
    table.write_bytes(b"no table")
    assert "can't be read as a table of logits" in refusal()
    np.savez(table, logits=np.zeros((2, 3), dtype=np.float32), keys=np.array(["a"]))
    assert "logits must have one row for each of the 1 images" in refusal()
    np.savez(table, scores=np.zeros((2, 3)))
    assert "needs keys (or path) and logits; it has scores" in refusal()


def test_tables_of_logits_with_wrong_values_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, table = save(tmp_path / "their.pth", ["ant", "bee", "cat"]), tmp_path / "logits.npz"
    store_logits(photos, teacher, "--logits", str(table))
    with np.load(table) as file:
        stored = dict(file)
    capsys.readouterr()

    def refusal(**changed: Any) -> str:
        np.savez(table, **stored | changed)
        assert distill(photos, table) == 2
        return capsys.readouterr().err

    first, logits = stored["keys"][0], stored["logits"]
    broken = logits.copy()
    broken[0, 1] = np.nan
    assert f"logits of 1 images hold NaN or infinity, such as those of {first}" in refusal(logits=broken)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert "probabilities: each row sums to 1; store the logits before the softmax" in refusal(logits=probabilities)
    expected = f"digests must be a hash of 16 bytes for each of the {len(logits)} images"
    assert expected in refusal(digests=stored["digests"][:, :8])
    assert expected in refusal(digests=stored["digests"][:-1])
    twice = np.array([first, first, *stored["keys"][2:]])
    assert f"{first} is listed twice, with different logits" in refusal(keys=twice)


@pytest.mark.parametrize("loss", ["hint=1", "simkd=1", "jacobian=1"])
def test_stored_logits_have_no_features(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    teacher, table = save(tmp_path / "their.pth", ["ant", "bee", "cat"]), tmp_path / "logits.npz"
    store_logits(photos, teacher, "--logits", str(table))
    capsys.readouterr()
    assert distill(photos, table, "--student_model", "simple", "--loss", loss) == 2
    assert "but stored logits serve losses on logits alone" in capsys.readouterr().err


def test_logits_of_changed_code_are_not_read_from_the_cache(
    photos: Path, code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS.split()[:-4], "--student_model", "mlp", "--distill", "--data_dir", str(photos)]
    flags += ["--teacher_model", f"{code}:bright", "--teacher_checkpoint", "none"]
    assert experiment([*flags, "--name", "before"]) == 0
    # The same weights, but other logits; another process would read the file again.
    code.write_text(code.read_text().replace("nn.AdaptiveAvgPool2d(1)", "nn.AdaptiveMaxPool2d(1)"))
    registry._execute.cache_clear()
    capsys.readouterr()
    assert experiment([*flags, "--name", "after"]) == 0
    assert experiment([*flags, "--name", "live", "--teacher_cache", "none"]) == 0
    assert_same_weights("live", "after")
    with pytest.raises(AssertionError):
        assert_same_weights("before", "after")


def test_a_poor_teacher_of_gray_images_is_tried_with_other_normalizations(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "gray.py"
    code.write_text(
        "from torch import nn\n\n\ndef net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    flags = [*FLAGS.split(), "--distill", "--data_dir", str(photos), "--teacher_model", f"{code}:net"]
    assert experiment([*flags, "--teacher_checkpoint", "none", "--allow_weak_teacher"]) == 0
    assert "net · validation accuracy" in capsys.readouterr().out


def test_a_student_starts_from_its_own_weights_with_its_classes_by_name(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS.split()[:-4], "--data_dir", str(photos), "--learning_rate", "1e-6", "--baseline"]
    start = ["--student_model", "linear", "--student_checkpoint", str(save(tmp_path / "s.pth", ["ant", "bee", "cat"]))]
    assert experiment([*flags, *start, "--name", "plain"]) == 0
    assert phases("plain")["baseline"]["val_acc_mean"] == 1
    settings = phases("plain")["baseline"]["provenance"]["settings"]
    assert settings["student_checkpoint"].startswith("file with SHA-256 ")
    # A checkpoint that names its classes, more of them, in another order.
    order = ("cat", "dog", "ant", "bee")
    classifier = build_classifier("linear", classes=order, image_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    classifier.network.load_state_dict(color_network(list(order)))
    state = {f"model.{key}": value for key, value in classifier.state_dict().items()}
    torch.save({"classifier": classifier.description.plain(), "state_dict": state}, tmp_path / "own.ckpt")
    start[-1] = str(tmp_path / "own.ckpt")
    assert experiment([*flags, *start, "--name", "named"]) == 0
    assert phases("named")["baseline"]["val_acc_mean"] == 1
    trained = torch.load("logs/named/baseline/version_0/checkpoints/best.ckpt")["state_dict"]
    assert len(trained["model.network.1.bias"]) == 3
    capsys.readouterr()
    start[-1] = str(save(tmp_path / "four.pth", list(order)))
    assert experiment([*flags, *start]) == 2
    assert "has 4 outputs, and doesn't name its classes; --student_pretrained FILE replaces" in capsys.readouterr().err
    assert experiment([*flags, *start, "--student_pretrained", start[-1]]) == 2
    assert "the student starts from one of them; drop one flag" in capsys.readouterr().err


def test_teachers_of_mixed_origin_form_an_ensemble_and_teach_an_assistant(
    photos: Path, tmp_path: Path, code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, table = save(tmp_path / "their.pth", ["ant", "bee", "cat"]), tmp_path / "logits.npz"
    store_logits(photos, teacher, "--logits", str(table))
    flags = [*FLAGS.split(), "--distill", "--data_dir", str(photos), "--ensemble_weights", "2", "1", "1"]
    flags += ["--teacher_model", "linear", f"{code}:bright", "densenet121", "--assistants", "simple"]
    assert experiment([*flags, "--teacher_checkpoint", str(teacher), "none", str(table)]) == 0
    output = capsys.readouterr().out
    for name in ("linear", "bright", "logits.npz"):
        assert f"{name} · validation accuracy 100.0%" in output
    assert "ensemble linear + " in output
    assert "assistant simple · validation accuracy" in output
