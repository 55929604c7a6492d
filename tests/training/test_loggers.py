"""Any Lightning logger gets scalars, hyperparameters, and images if it supports them."""

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import Logger

from kd.data import ImageData, read_splits
from kd.models import build_classifier
from kd.training import ClassifierModule, Hardware, RunTensorBoard, train
from tests.conftest import MakeFolder


class Recording(Logger):
    """A minimal logger."""

    name, version, experiment = "mine", "0", None

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, list[float]] = {}
        self.hyperparameters: dict[str, Any] = {}
        self.images: list[tuple[str, tuple[int, int]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.scalars.setdefault(tag, []).append(value)

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.hyperparameters |= params


class ShowingImages(Recording):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.images += [(key, image.size) for image in images]


@pytest.mark.parametrize("kind", [Recording, ShowingImages])
def test_a_user_logger_gets_scalars_hyperparameters_and_images_if_it_supports_them(
    kind: type[Recording], make_folder: MakeFolder, tmp_path: Path
) -> None:
    data = ImageData(read_splits(make_folder()), image_size=16, batch_size=6)
    classifier = build_classifier("linear", classes=data.splits.classes, image_size=16, mean=(0.4,) * 3, std=(0.2,) * 3)
    own, folder = kind(), tmp_path / "run"
    run = train(
        ClassifierModule(classifier),
        data,
        phase="baseline",
        folder=folder,
        hardware=Hardware(accelerator="cpu", precision="32-true"),
        max_epochs=2,
        loggers=[own, RunTensorBoard(folder)],
        hyperparameters={"loss": ["ce=1"], "mixup": None},
    )
    assert own.scalars["val/acc"] == [epoch["val/acc"] for epoch in run.history]
    assert {"train/loss", "train/ce", "train/acc", "val/loss", "lr", "images_per_second"} <= set(own.scalars)
    assert own.hyperparameters == {"loss": "ce=1", "phase": "baseline", "seed": 0}
    assert own.images == ([("train/images", (394, 466))] if kind is ShowingImages else [])
    assert list(folder.glob("events.out.*"))
