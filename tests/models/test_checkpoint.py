import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.errors import UserError
from kd.models import CLASSIFIER_KEY, STATE_PREFIX, Classifier, build_classifier, load_classifier, read_accuracy
from kd.teachers import Foreign, load_network


def save(classifier: Classifier, path: Path, **more: Any) -> Path:
    state = {f"{STATE_PREFIX}{name}": value for name, value in classifier.state_dict().items()}
    torch.save({"state_dict": state, CLASSIFIER_KEY: classifier.description.plain() | {"val_acc": 0.5}, **more}, path)
    return path


def convnet(architecture: str = "convnet(widths=[4, 6])") -> Classifier:
    return build_classifier(
        architecture, classes=("a", "b"), image_size=16, resize="squash", mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)
    )


def test_a_loaded_classifier_is_identical_and_in_evaluation_mode(tmp_path: Path) -> None:
    classifier = convnet()
    classifier(torch.rand(8, 3, 16, 16))  # updates the batch normalization statistics
    path = save(classifier, tmp_path / "c.ckpt")
    loaded = load_classifier(path)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), classifier.eval()(images), rtol=0, atol=0)
    assert loaded.description == classifier.description
    assert not loaded.training


FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "vit_b_32": 224,
}
"""The smallest network of each of torchvision's families but VGG, whose files are large, and the side of its images."""


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_network_of_each_family_is_saved_and_loaded(tmp_path: Path, architecture: str) -> None:
    size = FAMILIES[architecture]
    classifier = build_classifier(architecture, classes=("a", "b"), image_size=size).eval()
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        expected = classifier(images)
        torch.testing.assert_close(load_classifier(save(classifier, tmp_path / "c.ckpt"))(images), expected)


def test_one_output_for_two_classes_is_the_logit_of_the_second(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 1))\n"
    )
    classifier = build_classifier(f"{tmp_path / 'own.py'}:net", classes=("ant", "bee"), image_size=8)
    images = torch.rand(5, 3, 8, 8)
    logits, single = classifier(images), classifier.network(classifier.normalization(images))
    torch.testing.assert_close(logits.softmax(dim=1)[:, 1], single.sigmoid()[:, 0])


def test_a_checkpoint_of_version_0_1_is_read(tmp_path: Path) -> None:
    classifier = convnet()
    description = {
        "architecture": "convnet(widths=[4, 6])",
        "classes": ["a", "b"],
        "image_size": 16,
        "resize": "squash",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.1, 0.2, 0.3],
        "val_acc": 0.25,
    }
    state = {f"model.{name}": value for name, value in classifier.state_dict().items()}
    content = {"epoch": 3, "global_step": 40, "pytorch-lightning_version": "2.6.6", "loops": {}, "state_dict": state}
    torch.save(content | {"classifier": description}, tmp_path / "best.ckpt")
    loaded = load_classifier(tmp_path / "best.ckpt")
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), classifier.eval()(images), rtol=0, atol=0)
    assert loaded.description.classes == ("a", "b")
    assert read_accuracy(tmp_path / "best.ckpt") == 0.25


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("payload_was_executed"),))


@pytest.mark.parametrize(
    "kind", ["absent", "text", "empty", "pickle", "code", "foreign", "partial", "weights", "network"]
)
def test_an_invalid_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.ckpt"
    words = "can't be read as a checkpoint"
    match kind:
        case "absent":
            words = "there is no such checkpoint"
        case "text":
            path.write_text("hello")
        case "empty":
            path.write_bytes(b"")
        case "pickle":
            path.write_bytes(pickle.dumps(Payload()))
        case "code":
            save(convnet(), path, surprise=Payload())
        case "foreign":
            torch.save({"state_dict": {}}, path)
            words = "not a checkpoint of a classifier that kd trained"
        case "partial":
            torch.save({"state_dict": {}, CLASSIFIER_KEY: {"architecture": "linear"}}, path)
            words = "the description of its classifier is invalid: classes: Field required"
        case "weights":
            save(convnet(), path)
            checkpoint = torch.load(path, weights_only=True)
            checkpoint["state_dict"].popitem()
            torch.save(checkpoint, path)
            words = r"its weights don't match convnet\(widths"
        case "network":
            save(convnet(), path)
            words = r"--teacher_model resnet18: .* holds convnet\(widths=\[4, 6\]\)"
    with pytest.raises(UserError, match=words):
        load_classifier(path, architecture="resnet18" if kind == "network" else None, flag="--teacher_model")
    assert not Path("payload_was_executed").exists()


def test_spaces_in_an_architecture_do_not_matter(tmp_path: Path) -> None:
    path = save(convnet(), tmp_path / "c.ckpt")
    loaded = load_classifier(path, architecture="convnet(widths=[4,6])")
    assert loaded.count_parameters() == convnet().count_parameters()


def test_a_python_file_named_in_a_checkpoint_runs_only_on_request(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            "from torch import nn\n"
            "def net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes))\n"
        )
    path = save(convnet(f"{tmp_path}/here/mine.py:net"), tmp_path / "c.ckpt")
    with pytest.raises(UserError, match=r"to run that code, add --model '.*/here/mine.py:net'"):
        load_classifier(path)
    moved = f"{tmp_path}/there/mine.py:net"
    assert load_classifier(path, architecture=moved).description.classes == ("a", "b")


def test_a_python_file_named_within_an_architecture_runs_only_on_request(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "from pathlib import Path\nfrom torch import nn\n\nPath(__file__).with_name('ran').touch()\n\n\n"
        "def net(num_classes):\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "        nn.Linear(4, num_classes))\n"
    )
    nested = f"simkd(student='{code}:net', teacher='convnet(widths=[4, 6])', teacher_size=16, outputs=2)"
    description = convnet().description.plain() | {"architecture": nested}
    torch.save({"classifier": description, "state_dict": {}}, tmp_path / "c.ckpt")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors", {"kd": json.dumps(description)})
    with pytest.raises(UserError, match=r"its network is from a Python file; to run that code, add --model"):
        load_classifier(tmp_path / "c.ckpt")
    foreign = Foreign(prefix="teacher_")
    for name in ("c.ckpt", "c.safetensors"):
        with pytest.raises(UserError, match=r"from a Python file; to run that code, add --teacher_model"):
            load_network(tmp_path / name, model=None, data_classes=("a", "b"), image_size=16, foreign=foreign)
    assert not (tmp_path / "ran").exists()
    # Asked for, from another folder.
    other = nested.replace(str(code), f"elsewhere/{code.name}")
    with pytest.raises(UserError, match="there is no file"):
        load_classifier(tmp_path / "c.ckpt", architecture=other)
