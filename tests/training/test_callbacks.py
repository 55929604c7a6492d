import io
from pathlib import Path

import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.data import ImageData, read_splits
from kd.models import build_classifier
from kd.training import ClassifierModule, Hardware, RunTensorBoard, draw_views, train
from tests.conftest import MakeFolder


def fit(folder: Path, experiment: Path, console: Console) -> str:
    data = ImageData(read_splits(folder), image_size=16, batch_size=6)
    classifier = build_classifier("linear", classes=data.splits.classes, image_size=16, mean=(0.4,) * 3, std=(0.2,) * 3)
    hardware = Hardware(accelerator="cpu", precision="32-true")
    module = ClassifierModule(classifier)
    run = train(
        module,
        data,
        phase="teacher",
        folder=experiment,
        loggers=[RunTensorBoard(experiment)],
        hardware=hardware,
        max_epochs=3,
        title="Teacher",
        console=console,
    )
    assert run.images_per_second > 0
    return run.folder or ""


def test_without_a_terminal_a_line_says_how_it_ended(make_folder: MakeFolder, tmp_path: Path) -> None:
    output = io.StringIO()
    fit(make_folder(), tmp_path / "e", Console(file=output, width=200))
    lines = output.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Teacher: epoch 3/3  loss ")
    assert " val acc " in lines[0]
    assert lines[0].endswith(" images/s")


def test_in_a_terminal_one_bar_covers_the_phase(make_folder: MakeFolder, tmp_path: Path) -> None:
    output = io.StringIO()
    fit(make_folder(), tmp_path / "e", Console(file=output, width=160, force_terminal=True))
    last = output.getvalue().split("Teacher ")[-1]
    assert "epoch 3/3" in last
    assert "images/s" in last
    assert "left" in last


def test_tensorboard_shows_training_images_with_their_labels(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = fit(make_folder(), tmp_path / "e", Console(file=io.StringIO()))
    events = EventAccumulator(folder)
    events.Reload()
    assert events.Tags()["images"] == ["train/images"]
    data = ImageData(read_splits(tmp_path / "photos"), image_size=16)
    # Small images are enlarged six times; a caption of 18 pixels and a border of 2 around each.
    assert draw_views(data, count=5).shape == (3, 2 * (96 + 18 + 2) + 2, 4 * (96 + 2) + 2)
    assert draw_views(data).dtype == torch.uint8
