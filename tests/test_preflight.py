"""What is known to be wrong before the first step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kd import preflight
from kd.cli import experiment
from kd.data import BROKEN, FileFinding, LabeledImages, Splits, check_images, drop_broken, find_duplicates, read_splits
from kd.errors import UserError
from kd.losses import build_objective
from kd.models import Classifier, build_classifier, can_step, free_memory, largest_batch, training_bytes
from kd.preflight import Finding, refuse
from tests.conftest import MakeFolder


def _network(architecture: str, classes: tuple[str, ...] = ("a", "b"), size: int = 16) -> Classifier:
    return build_classifier(architecture, classes=classes, image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)


def _splits(classes: tuple[str, ...], count: int = 20) -> Splits:
    labels = [index % len(classes) for index in range(count)]
    keys = [str(index) for index in range(count)]
    images = LabeledImages(classes, labels, keys, lambda _: torch.zeros(3, 8, 8, dtype=torch.uint8))
    return Splits("made", images, images)


def _texts(found: list[Finding], level: str) -> list[str]:
    return [one.text for one in found if one.level == level]


def test_the_same_image_in_both_is_found_by_its_content(make_folder: MakeFolder) -> None:
    folder = make_folder()
    twin = folder / "val" / "bee" / "twin.png"
    twin.write_bytes((folder / "train" / "ant" / "3.png").read_bytes())
    splits = read_splits(folder)
    assert find_duplicates(splits.train, splits.val) == [(folder / "train" / "ant" / "3.png", twin)]
    (told,) = [text for text in _texts(preflight.check_splits(splits, batch_size=8), "warning") if "stands in" in text]
    assert told.startswith("1 of 16 validation images stands in the training images, too")
    assert str(twin) in told


def test_classes_with_very_few_images_are_named() -> None:
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
        (3.0, 3, None, "these are 30 steps, and the training has 30: the learning rate never arrives"),
        (1.0, 3, 8, "these are 10 steps, and the training has 8"),
        (0.0, 1, None, "the training has 10 steps, too few to learn much in"),
    ],
)
def test_a_schedule_needs_steps(warmup: float, epochs: int, max_steps: int | None, words: str | None) -> None:
    found = preflight.check_schedule(batches=20, accumulate=2, epochs=epochs, max_steps=max_steps, warmup=warmup)
    assert [one.level for one in found] == ([] if words is None else ["warning"])
    assert words is None or words in found[0].text


def test_a_temperature_that_no_term_has_is_a_warning() -> None:
    (told,) = preflight.check_temperature([build_objective("mse ce")], 3.0)
    assert told.text == "--temperature 3: no term of the objective has one (mse ce)"
    assert preflight.check_temperature([build_objective("mse"), build_objective("kl")], 3.0) == []
    assert preflight.check_temperature([build_objective("mse")], None) == []


def test_a_student_larger_than_its_teacher_is_noted() -> None:
    small, large = _network("linear"), _network("mlp")
    assert _texts(preflight.check_sizes(large, small), "note")[0].startswith("the student mlp has more parameters than")
    assert preflight.check_sizes(small, large) == []


def test_weights_from_imagenet_have_seen_imagenette() -> None:
    imagenette = _splits(("n01440764", "n02102040"))
    resnet = _network("resnet18", imagenette.classes, 64)
    found = preflight.check_published(imagenette, flags=["--teacher_pretrained"], networks=[resnet])
    assert _texts(found, "warning")[0].startswith(
        "--teacher_pretrained: weights that were trained on ImageNet have seen"
    )
    assert _texts(found, "warning")[1] == "--image_size 64: the published weights of resnet18 were made for 224 px"
    assert preflight.check_published(imagenette, flags=[], networks=[]) == []
    assert preflight.check_published(_splits(("n01440764", "dog")), flags=["--teacher_pretrained"], networks=[]) == []


def test_an_accuracy_is_compared_with_what_the_checkpoint_says() -> None:
    (told,) = preflight.check_accuracy(said=0.9, measured=0.5, images=100, whose="the teacher")
    assert told.text.startswith(
        "the teacher's checkpoint says 90.0%, and on these 100 validation images it is right on"
    )
    # What chance may do to a hundred images is no finding.
    assert preflight.check_accuracy(said=0.9, measured=0.85, images=100, whose="the teacher") == []
    assert preflight.check_accuracy(said=None, measured=0.1, images=100, whose="the teacher") == []


def test_disk_and_memory_that_will_not_suffice_are_found(tmp_path: Path) -> None:
    student, teacher = _network("linear"), _network("mlp")
    known: dict[str, Any] = {"folder": tmp_path / "logs", "trains_teacher": True, "on_cpu": True}
    assert preflight.check_room(student, [teacher], batch_size=8, trainings=3, **known) == []
    assert _texts(preflight.check_room(student, [teacher], batch_size=8, trainings=10**12, **known), "error")
    (told,) = _texts(preflight.check_room(student, [teacher], batch_size=10**9, trainings=1, **known), "warning")
    assert "to train mlp takes about" in told


def test_files_are_examined_and_remembered(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder()
    broken = folder / "train" / "ant" / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    inks = folder / "train" / "bee" / "inks.jpg"
    Image.new("CMYK", (20, 16)).save(inks)
    train = read_splits(folder).train
    found = check_images(train, cache=tmp_path / "examined")
    assert [(one.kind, one.path) for one in found] == [(BROKEN, str(broken)), ("cmyk", str(inks))]
    assert check_images(train, cache=tmp_path / "examined") == found
    (kept,) = (tmp_path / "examined").iterdir()
    kept.write_text("[[1]]")
    assert check_images(train, cache=tmp_path / "examined") == found
    fewer = drop_broken(train, found[:1])
    assert len(fewer) == len(train) - 1
    assert "ant/2.png" not in fewer.keys
    torch.testing.assert_close(fewer.load(2), train.load(3), rtol=0, atol=0)
    with pytest.raises(UserError, match="class 'ant': all of its image files are broken"):
        drop_broken(train, [FileFinding(BROKEN, str(path), "") for path in train.files if "ant" in str(path)])


def test_errors_stop_and_warnings_stop_where_that_is_asked_for() -> None:
    note, warning, error = (Finding(level, f"a {level}") for level in ("note", "warning", "error"))
    refuse([note, warning], strict=False)
    refuse([note], strict=True)
    with pytest.raises(UserError, match=r"^--strict: a warning, and nothing was begun:\n  a warning$"):
        refuse([note, warning], strict=True)
    with pytest.raises(UserError, match=r"^a error$"):
        refuse([note, warning, error], strict=False)


def test_a_batch_is_the_largest_that_fits(tmp_path: Path) -> None:
    class Crowded(nn.Module):
        """Has room for so many images, as a GPU has."""

        def __init__(self, room: int) -> None:
            super().__init__()
            self.room, self.layer = room, nn.Linear(3 * 16 * 16, 2)

        def forward(self, images: Tensor) -> Tensor:
            if len(images) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            logits: Tensor = self.layer(images.flatten(1))
            return logits

    device = torch.device("cpu")
    description = _network("linear").description
    crowded = Classifier(Crowded(20), description)
    assert can_step(crowded, 20, device)
    assert not can_step(crowded, 21, device)
    small = _network("linear")
    assert largest_batch([small], device=device, most=100) == 64
    assert largest_batch([small], device=device, most=1) == 1
    # Half of the free memory is what the estimate may come to.
    free = free_memory()
    assert free is not None
    large = _network("convnet(widths=[64, 64])", size=224)
    fits = largest_batch([small, large], device=device, most=2**30)
    assert training_bytes(large, fits) <= free * 0.6
    assert training_bytes(large, 4 * fits) > free * 0.4


def test_an_automatic_batch_size_is_said_and_used(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--image_size 16 --student_model linear --accelerator cpu --max_epochs 1 --batch_size auto --name it"
    assert experiment(f"--data_dir {make_folder()} {flags}".split()) == 0
    assert "--batch_size auto: 8\n" in capsys.readouterr().out
    facts = json.loads(Path("logs/it/baseline/version_0/metrics.json").read_text())
    assert (facts["recipe"]["batch_size"], facts["steps"]) == (8, 3)
    assert experiment(f"--data_dir {make_folder('other')} --batch_size many".split()) == 2
    assert "--batch_size many: must be a whole number or auto" in capsys.readouterr().err
