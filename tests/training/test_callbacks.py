import io
import re
from pathlib import Path

import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.console import make_console
from kd.data import ImageData, read_splits
from kd.models import build_classifier
from kd.training import ClassifierModule, Hardware, RunTensorBoard, draw_views, train
from tests.conftest import MakeFolder


def fit(folder: Path, experiment: Path, console: Console, *, max_steps: int | None = None) -> str:
    data = ImageData(read_splits(folder), image_size=16, batch_size=6)
    classifier = build_classifier("linear", classes=data.splits.classes, image_size=16, mean=(0.4,) * 3, std=(0.2,) * 3)
    run = train(
        ClassifierModule(classifier),
        data,
        phase="teacher",
        folder=experiment,
        loggers=[RunTensorBoard(experiment)],
        hardware=Hardware(accelerator="cpu", precision="32-true"),
        max_epochs=3,
        max_steps=max_steps,
        console=console,
    )
    assert run.images_per_second > 0
    return run.folder or ""


def test_without_a_terminal_one_line_reports_the_last_epoch(make_folder: MakeFolder, tmp_path: Path) -> None:
    output = io.StringIO()
    fit(make_folder(), tmp_path / "e", make_console(file=output))
    (line,) = output.getvalue().splitlines()
    numbers = r"loss \d\.\d{3} · train acc \d\.\d{3} · val acc \d\.\d{3} · [\d,]+ img/s"
    assert re.fullmatch(rf"teacher linear · epoch 3/3 · {numbers}", line)


def test_epochs_are_counted_up_to_the_last_step(make_folder: MakeFolder, tmp_path: Path) -> None:
    output = io.StringIO()
    # Four batches an epoch.
    fit(make_folder(), tmp_path / "e", make_console(file=output), max_steps=5)
    assert " · epoch 2/2 · " in output.getvalue()


def test_in_a_terminal_of_80_columns_the_bar_fits_one_line(make_folder: MakeFolder, tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, width=80, force_terminal=True, highlight=False)
    fit(make_folder(), tmp_path / "e", console)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    bars = [line for line in re.split(r"[\r\n]+", plain) if "━" in line]
    assert all(line.startswith("teacher linear") and len(line) <= 80 for line in bars)
    assert "epoch 3/3" in bars[-1]
    assert "val acc" in bars[-1]


def test_tensorboard_shows_training_images_with_their_labels(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = fit(make_folder(), tmp_path / "e", Console(file=io.StringIO()))
    events = EventAccumulator(folder)
    events.Reload()
    assert events.Tags()["images"] == ["train/images"]
    data = ImageData(read_splits(tmp_path / "photos"), image_size=16)
    # Small images are enlarged six times; a caption of 18 pixels and a border of 2 around each.
    assert draw_views(data, count=5).shape == (3, 2 * (96 + 18 + 2) + 2, 4 * (96 + 2) + 2)
    assert draw_views(data).dtype == torch.uint8
