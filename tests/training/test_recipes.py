"""Freezing, averaging of epochs, and the statistics of batch normalization."""

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from kd.console import make_console
from kd.data import ImageData, read_splits
from kd.models import Classifier, Description, build_classifier, load_classifier
from kd.training import ClassifierModule, Hardware, Recipe, Run, train
from tests.conftest import MakeFolder

CPU = Hardware(accelerator="cpu", precision="32-true")


def network(architecture: str = "resnet18", size: int = 32) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(
        architecture, classes=("ant", "bee", "cat"), image_size=size, mean=(0.5,) * 3, std=(0.2,) * 3
    )


def fit(module: ClassifierModule, folder: Path, images: Path, *, epochs: int, **options: Any) -> Run:
    data = ImageData(read_splits(images), image_size=32, batch_size=8, augment="none")
    return train(module, data, phase="baseline", folder=folder, hardware=CPU, max_epochs=epochs, **options)


def state_of(classifier: Classifier) -> dict[str, Tensor]:
    return copy.deepcopy(classifier.state_dict())


@pytest.mark.parametrize("freeze", ["backbone", 1])
def test_a_frozen_backbone_keeps_its_weights_and_statistics(
    make_folder: MakeFolder, tmp_path: Path, freeze: int | str
) -> None:
    images, classifier = make_folder(train=8, val=4), network()
    before = state_of(classifier)
    module = ClassifierModule(classifier, recipe=Recipe(freeze=freeze, learning_rate=0.01))
    fit(module, tmp_path / "one", images, epochs=1)
    after = state_of(classifier)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"network.fc.weight", "network.fc.bias"}
    # Thawed after an epoch, or never.
    classifier = network()
    module = ClassifierModule(classifier, recipe=Recipe(freeze=freeze, learning_rate=0.01))
    fit(module, tmp_path / "two", images, epochs=2)
    weights = dict(classifier.named_parameters())
    thawed = not torch.equal(weights["network.conv1.weight"], before["network.conv1.weight"])
    assert thawed == (freeze == 1)
    assert weights["network.conv1.weight"].requires_grad == (freeze == 1)


def test_the_weights_of_the_last_epochs_are_averaged_validated_and_saved(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    images, states = make_folder(train=8, val=4), list[dict[str, Tensor]]()

    def keep(epoch: int, accuracy: float) -> None:
        states.append(state_of(module.model))  # type: ignore[arg-type]

    module = ClassifierModule(
        network("convnet(widths=[6])"), recipe=Recipe(swa=2, learning_rate=0.05, schedule="constant")
    )
    run = fit(module, tmp_path / "run", images, epochs=4, on_epoch=keep)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in states[0].items():
        if value.is_floating_point():
            mean = torch.stack([state[name] for state in states[1:]]).mean(dim=0)
            torch.testing.assert_close(saved[f"model.{name}"], mean, rtol=1e-5, atol=1e-6)
    assert run.checkpoint is not None
    # Before the first average, the trained weights are validated.
    assert load_classifier(run.checkpoint).description.classes == ("ant", "bee", "cat")


class Lagging(nn.Module):
    """Classifies by the color channel, behind batch normalization whose statistics hardly move."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=momentum)
        # The third channel always appears as the brightest.
        self.norm.running_mean = torch.tensor([1e3, 0.0, -1e3])
        head = nn.Linear(3, 3, bias=False)
        head.weight.data.copy_(torch.eye(3) * 20)
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(self.norm(images))
        return logits


def lagging(momentum: float = 1e-6) -> Classifier:
    description = Description("lagging", ("ant", "bee", "cat"), 32, "crop", (0.0,) * 3, (1.0,) * 3)
    return Classifier(Lagging(momentum), description)


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """Write noisy images in the color of their class."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for channel, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "colors" / split / name).mkdir(parents=True)
            for number in range(16):
                pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(tmp_path / "colors" / split / name / f"{number}.png")
    return tmp_path / "colors"


def test_validation_at_chance_is_explained_by_lagging_statistics(colors: Path, tmp_path: Path) -> None:
    console = make_console(file=io.StringIO())
    console.width = 400
    plain = ClassifierModule(lagging(), recipe=Recipe(learning_rate=1e-5))
    run = fit(plain, tmp_path / "plain", colors, epochs=3, console=console)
    assert run.val_acc == pytest.approx(1 / 3)
    output: Any = console.file
    text = output.getvalue()
    assert text.count("warning: validation accuracy 33.3% is at chance, but training accuracy is 100.0%") == 1
    assert "(momentum 1e-06) lag behind the weights; recomputed on 512 training images, they give 100.0%" in text
    assert "add --update_bn" in text
    # The trial changes nothing: the weights are those of a training whose validation isn't at chance.
    quiet = ClassifierModule(lagging(), recipe=Recipe(learning_rate=1e-5, update_bn=True))
    run = fit(quiet, tmp_path / "quiet", colors, epochs=3, console=console)
    assert run.val_acc == 1
    for name, weight in quiet.model.named_parameters():
        assert torch.equal(weight, dict(plain.model.named_parameters())[name])


def test_statistics_that_catch_up_during_the_training_are_a_note(colors: Path, tmp_path: Path) -> None:
    console = make_console(file=io.StringIO())
    run = fit(
        ClassifierModule(lagging(0.05), recipe=Recipe(learning_rate=1e-5)),
        tmp_path / "run",
        colors,
        epochs=40,
        console=console,
    )
    output: Any = console.file
    text = output.getvalue()
    assert "note: validation accuracy 33.3% is at chance, but training accuracy is 100.0%" in text
    assert "they give 100.0%; this passes as training goes on" in text
    assert "--update_bn" not in text
    assert run.val_acc == 1


def test_recomputed_statistics_are_those_of_the_training_images(colors: Path, tmp_path: Path) -> None:
    module = ClassifierModule(lagging(), recipe=Recipe(learning_rate=1e-5, update_bn=True))
    fit(module, tmp_path / "run", colors, epochs=1)
    data = ImageData(read_splits(colors), image_size=32, batch_size=8, augment="none")
    expected = lagging()
    update_bn((views.float() / 255 for views in data.sample_views(48)), expected)
    found = module.model.state_dict()
    for name in ("network.norm.running_mean", "network.norm.running_var"):
        torch.testing.assert_close(found[name], expected.state_dict()[name])


def test_another_cause_is_said_to_be_another(colors: Path, tmp_path: Path) -> None:
    console = make_console(file=io.StringIO())
    console.width = 400
    splits = read_splits(colors)
    shuffled = [*splits.val.labels[16:], *splits.val.labels[:16]]
    # None of the labels is right.
    data = ImageData(
        replace(splits, val=replace(splits.val, labels=shuffled)), image_size=32, batch_size=8, augment="none"
    )
    module = ClassifierModule(lagging(), recipe=Recipe(learning_rate=1e-5, update_bn=True))
    train(module, data, phase="baseline", folder=tmp_path / "x", hardware=CPU, max_epochs=2, console=console)
    output: Any = console.file
    assert (
        "recomputed statistics of batch normalization don't change that; do training and validation"
        in output.getvalue()
    )
