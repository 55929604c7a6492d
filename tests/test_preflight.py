"""Checks before training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kd import preflight
from kd.cli import experiment
from kd.data import BROKEN, FileFinding, LabeledImages, Splits, drop_broken, examine, find_duplicates, read_splits
from kd.errors import UserError
from kd.losses import build_objective
from kd.models import Classifier, build_classifier, free_memory, largest_batch, training_bytes
from kd.models.cost import can_step
from kd.preflight import Finding, refuse
from tests.conftest import MakeFolder


def _network(architecture: str, classes: tuple[str, ...] = ("a", "b"), size: int = 16) -> Classifier:
    return build_classifier(architecture, classes=classes, image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)


def _splits(classes: tuple[str, ...], count: int = 20) -> Splits:
    labels = [index % len(classes) for index in range(count)]
    keys = [str(index) for index in range(count)]
    images = LabeledImages(classes, labels, keys, lambda _: torch.zeros(3, 8, 8, dtype=torch.uint8))
    return Splits("images", images, images)


def _texts(found: list[Finding], level: str) -> list[str]:
    return [finding.text for finding in found if finding.level == level]


def test_validation_images_that_are_also_training_images_are_found(make_folder: MakeFolder) -> None:
    folder = make_folder()
    copy = folder / "val" / "bee" / "copy.png"
    copy.write_bytes((folder / "train" / "ant" / "3.png").read_bytes())
    splits = read_splits(folder)
    splits = replace(splits, train=examine(splits.train)[0], val=examine(splits.val)[0])
    assert find_duplicates(splits.train, splits.val) == [(str(folder / "train" / "ant" / "3.png"), str(copy))]
    warnings = _texts(preflight.check_splits(splits, batch_size=8), "warning")
    (duplicates,) = [text for text in warnings if "also training images" in text]
    assert duplicates.startswith("1 of 16 validation images are also training images")
    assert str(copy) in duplicates


def test_classes_with_few_images_are_reported() -> None:
    found = _texts(preflight.check_splits(_splits(("many", "few"), 19), batch_size=8), "warning")
    assert found == [
        "classes with fewer than 10 training images: few (9)",
        "classes with fewer than 10 validation images: few (9)",
    ]
    assert preflight.check_splits(_splits(("many", "also")), batch_size=8) == []


@pytest.mark.parametrize(
    ("warmup", "epochs", "max_steps", "words"),
    [
        (0.0, 3, None, None),
        (3.0, 3, None, "30 warm-up steps, but the training has 30 steps; the learning rate doesn't reach"),
        (1.0, 3, 8, "10 warm-up steps, but the training has 8 steps"),
        (0.0, 1, None, "the training has only 10 steps"),
    ],
)
def test_schedules_with_too_few_steps_are_reported(
    warmup: float, epochs: int, max_steps: int | None, words: str | None
) -> None:
    found = preflight.check_schedule(batches=20, accumulate=2, epochs=epochs, max_steps=max_steps, warmup=warmup)
    assert [finding.level for finding in found] == ([] if words is None else ["warning"])
    assert words is None or words in found[0].text


def test_an_unused_temperature_is_a_warning() -> None:
    (warning,) = preflight.check_temperature([build_objective("mse ce")], 3.0)
    assert warning.text == "--temperature 3: no term of the objective has a temperature (mse ce)"
    assert preflight.check_temperature([build_objective("mse"), build_objective("kl")], 3.0) == []
    assert preflight.check_temperature([build_objective("mse")], None) == []


def test_a_student_larger_than_its_teacher_is_noted() -> None:
    small, large = _network("linear"), _network("mlp")
    assert _texts(preflight.check_sizes(large, small), "note")[0].startswith("the student mlp has more parameters than")
    assert preflight.check_sizes(small, large) == []


def test_imagenet_weights_for_imagenet_classes_are_reported() -> None:
    imagenette = _splits(("n01440764", "n02102040"))
    resnet = _network("resnet18", imagenette.classes, 64)
    found = preflight.check_published(imagenette, flags=["--teacher_pretrained"], networks=[resnet])
    seen, size = _texts(found, "warning")
    assert seen.startswith("--teacher_pretrained: weights trained on ImageNet have seen images of these classes")
    assert size == "--image_size 64: the published weights of resnet18 were trained at 224 px"
    assert preflight.check_published(imagenette, flags=[], networks=[]) == []
    assert preflight.check_published(_splits(("n01440764", "dog")), flags=["--teacher_pretrained"], networks=[]) == []


def test_an_accuracy_below_that_of_the_checkpoint_is_reported() -> None:
    (warning,) = preflight.check_accuracy(0.9, 0.5, images=100, teacher="the teacher")
    assert warning.text.startswith(
        "the teacher has an accuracy of 50.0% on these 100 validation images, but its checkpoint records 90.0%"
    )
    # Within the sampling error of 100 images.
    assert preflight.check_accuracy(0.9, 0.85, images=100, teacher="the teacher") == []
    assert preflight.check_accuracy(None, 0.1, images=100, teacher="the teacher") == []


def test_insufficient_disk_space_and_memory_are_reported(tmp_path: Path) -> None:
    student, teacher = _network("linear"), _network("mlp")
    options: dict[str, Any] = {"folder": tmp_path / "logs", "trains_teacher": True, "on_cpu": True}
    assert preflight.check_resources(student, [teacher], batch_size=8, trainings=3, **options) == []
    assert _texts(preflight.check_resources(student, [teacher], batch_size=8, trainings=10**12, **options), "error")
    (warning,) = _texts(
        preflight.check_resources(student, [teacher], batch_size=10**9, trainings=1, **options), "warning"
    )
    assert "training mlp needs about" in warning


def test_results_of_file_checks_are_cached(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder()
    broken = folder / "train" / "ant" / "2.png"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    cmyk = folder / "train" / "bee" / "cmyk.jpg"
    Image.new("CMYK", (20, 16)).save(cmyk)
    train = read_splits(folder).train
    _, found = examine(train, cache=tmp_path / "examined")
    assert [(finding.kind, finding.path) for finding in found] == [(BROKEN, str(broken)), ("cmyk", str(cmyk))]
    assert examine(train, cache=tmp_path / "examined")[1] == found
    (cached,) = (tmp_path / "examined").iterdir()
    cached.write_text("[[1]]")
    assert examine(train, cache=tmp_path / "examined")[1] == found
    fewer = drop_broken(train, found[:1])
    assert len(fewer) == len(train) - 1
    assert "ant/2.png" not in fewer.keys
    torch.testing.assert_close(fewer.load(2), train.load(3), rtol=0, atol=0)
    with pytest.raises(UserError, match="class 'ant': all of its image files are broken"):
        drop_broken(train, [FileFinding(BROKEN, str(path), "") for path in train.files if "ant" in str(path)])


def test_errors_and_with_strict_warnings_stop_the_run() -> None:
    note, warning, error = (Finding(level, f"a {level}") for level in ("note", "warning", "error"))
    refuse([note, warning], strict=False)
    refuse([note], strict=True)
    with pytest.raises(UserError, match=r"^--strict: nothing was started because of warnings:\n  a warning$"):
        refuse([note, warning], strict=True)
    with pytest.raises(UserError, match=r"^a error$"):
        refuse([note, warning, error], strict=False)


def test_the_largest_batch_that_fits_in_memory_is_chosen(tmp_path: Path) -> None:
    class Limited(nn.Module):
        """Runs out of memory above a number of images, like a GPU."""

        def __init__(self, limit: int) -> None:
            super().__init__()
            self.limit, self.layer = limit, nn.Linear(3 * 16 * 16, 2)

        def forward(self, images: Tensor) -> Tensor:
            if len(images) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            logits: Tensor = self.layer(images.flatten(1))
            return logits

    device = torch.device("cpu")
    description = _network("linear").description
    limited = Classifier(Limited(20), description)
    assert can_step(limited, 20, device)
    assert not can_step(limited, 21, device)
    small = _network("linear")
    assert largest_batch([small], device=device, most=100) == 64
    assert largest_batch([small], device=device, most=1) == 1
    # The estimate may be half of the free memory.
    free = free_memory()
    assert free is not None
    large = _network("convnet(widths=[64, 64])", size=224)
    fits = largest_batch([small, large], device=device, most=2**30)
    assert training_bytes(large, fits) <= free * 0.6
    assert training_bytes(large, 4 * fits) > free * 0.4


def test_an_automatic_batch_size_is_printed_and_used(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--image_size 16 --student_model linear --accelerator cpu --max_epochs 1 --batch_size auto --name it"
    assert experiment(f"--data_dir {make_folder()} {flags}".split()) == 0
    assert "--batch_size auto: 8\n" in capsys.readouterr().out
    facts = json.loads(Path("logs/it/baseline/version_0/metrics.json").read_text())
    assert (facts["provenance"]["settings"]["batch_size"], facts["steps"]) == (8, 3)
    assert experiment(f"--data_dir {make_folder('other')} --batch_size many".split()) == 2
    assert "--batch_size many: must be a whole number or auto" in capsys.readouterr().err
