"""A network of each family of torchvision: trained, saved, resumed, evaluated and exported."""

from pathlib import Path

import pytest
import torch

from kd.data import ImageData, read_splits
from kd.deploy import open_student
from kd.deploy.export import export_student
from kd.models import build_classifier, load_classifier
from kd.training import ClassifierModule, Hardware, Recipe, ResumeOptions, evaluate, newest_checkpoint, train
from tests.conftest import MakeFolder
from tests.models.test_checkpoint import FAMILIES

CPU = Hardware(accelerator="cpu", precision="32-true", limit_train_batches=1)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_network_is_trained_resumed_evaluated_and_exported(
    make_folder: MakeFolder, tmp_path: Path, architecture: str
) -> None:
    pytest.importorskip("safetensors")
    size = FAMILIES[architecture]
    splits = read_splits(make_folder(classes=("ant", "bee"), train=2, val=2))
    folder = tmp_path / "run"

    def run(epochs: int) -> float:
        torch.manual_seed(0)
        classifier = build_classifier(architecture, classes=splits.classes, image_size=size)
        data = ImageData(splits, image_size=size, batch_size=2, augment="none")
        module = ClassifierModule(classifier, recipe=Recipe(schedule="constant", learning_rate=1e-6))
        resume = ResumeOptions(newest_checkpoint(folder))
        done = train(module, data, phase="teacher", folder=folder, hardware=CPU, max_epochs=epochs, resume=resume)
        assert done.steps == epochs
        return done.val_acc

    run(1)
    accuracy = run(2)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    classifier = load_classifier(checkpoint)
    data = ImageData(splits, image_size=size, batch_size=2)
    assert evaluate(classifier, data, hardware=CPU)["val/acc"] == pytest.approx(accuracy)
    (exported,) = export_student(checkpoint, tmp_path / "x.safetensors", file_format="safetensors", splits=splits)
    assert (exported.difference, exported.agreement) == (0.0, 1.0)
    assert open_student(tmp_path / "x.safetensors").metadata["classes"] == ["ant", "bee"]
