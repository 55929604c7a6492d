"""Results are resumed, reused and compared only if what they depend on is unchanged."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd.cli import experiment, main
from kd.models import load_classifier
from kd.pipeline.run_store import METRICS_FILE
from tests.conftest import MakeFolder

SMALL = (
    "--image_size 16 --batch_size 8 --augment none --accelerator cpu --teacher_model convnet(widths=[6]) "
    "--student_model linear --max_epochs 2 --allow_weak_teacher"
)
LOSS = """import helpers


def halved(student_logits, teacher_logits, labels):
    return helpers.FACTOR * (student_logits - teacher_logits).square().mean()
"""


def flags_for(folder: Path, *more: str, name: str = "pets") -> list[str]:
    return ["--data_dir", str(folder), *SMALL.split(), "--name", name, *more]


def interrupt(phase: str) -> None:
    """Leave a finished run as if it had been killed after its last checkpoint."""
    Path("logs/pets", phase, "version_0", METRICS_FILE).unlink()


def replace_images(folder: Path) -> None:
    """Replace all images by noise of the same names."""
    generator = np.random.default_rng(1)
    for path in folder.rglob("*.png"):
        Image.fromarray(generator.integers(0, 255, (16, 20, 3), dtype=np.uint8)).save(path)


def test_a_finished_run_is_not_resumed_with_other_images(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder()
    flags = flags_for(folder, "--baseline")
    assert experiment(flags) == 0
    replace_images(folder)
    capsys.readouterr()
    assert experiment([*flags, "--resume"]) == 2
    output = capsys.readouterr()
    assert re.search(
        r"--resume: logs/pets/baseline/version_0 was started with training images: 24 images in 3 classes, content "
        r"\w{16} \(now 24 images in 3 classes, content \w{16}\); validation images: .*; restore .*, or start anew",
        output.err,
    )
    assert "val acc" not in output.out


def test_images_added_after_an_interruption_are_refused(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder()
    flags = flags_for(folder, "--baseline")
    assert experiment(flags) == 0
    interrupt("baseline")
    shutil.copyfile(folder / "train" / "ant" / "0.png", folder / "train" / "bee" / "added.png")
    assert experiment([*flags, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "training images: 24 images in 3 classes" in error
    assert "(now 25 images in 3 classes" in error
    assert "validation images" not in error


def test_a_moved_data_set_is_the_same(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder()
    assert experiment(flags_for(folder, "--baseline")) == 0
    elsewhere = folder.rename(folder.parent / "elsewhere")
    capsys.readouterr()
    assert experiment(flags_for(elsewhere, "--baseline", "--resume")) == 0
    assert "already finished" in capsys.readouterr().out


def test_a_baseline_of_other_images_is_not_shown(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder()
    flags = flags_for(folder)
    assert experiment([*flags, "--train_teacher", "--baseline"]) == 0
    replace_images(folder)
    capsys.readouterr()
    assert experiment([*flags, "--distill"]) == 0
    output = capsys.readouterr().out
    assert "note: this teacher was trained with other images: training images: 24 images" in output
    assert "student, distilled" in output
    assert "student, labels only" not in output


def test_exchanged_class_folders_are_other_images(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder()
    flags = flags_for(folder, "--baseline", "--image_cache", str(folder.parent / "images"))
    assert experiment(flags) == 0
    for split in ("train", "val"):
        ant, bee, other = (folder / split / name for name in ("ant", "bee", "other"))
        ant.rename(other)
        bee.rename(ant)
        other.rename(bee)
    assert experiment([*flags, "--resume"]) == 2
    assert "training images" in capsys.readouterr().err


@pytest.mark.parametrize("edited", ["losses.py", "helpers.py"])
def test_an_edited_loss_is_not_resumed(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], edited: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "losses.py").write_text(LOSS.replace("helpers", f"helpers_{edited[:-3]}"))
    (own / f"helpers_{edited[:-3]}.py").write_text("FACTOR = 0.5\n")
    file = own / edited.replace("helpers", "helpers_helpers")
    flags = flags_for(make_folder(), "--loss", f"{own / 'losses.py'}:halved=1")
    assert experiment([*flags, "--train_teacher", "--distill"]) == 0
    interrupt("distilled")
    file.write_text(f"{file.read_text()}\n# edited\n")
    assert experiment([*flags, "--train_teacher", "--distill", "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"distilled/version_0 was started with {file.name}: " in error
    assert error.count("(now ") == 1


def test_another_teacher_is_not_a_resume(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder()
    flags = flags_for(folder)
    assert experiment([*flags, "--train_teacher", "--distill"]) == 0
    checkpoint = Path("logs/pets/teacher/version_0/checkpoints/best.ckpt")
    interrupt("distilled")
    assert experiment(flags_for(folder, "--train_teacher", "--seed", "7", name="other")) == 0
    shutil.copyfile("logs/other/teacher/version_0/checkpoints/best.ckpt", checkpoint)
    capsys.readouterr()
    assert experiment([*flags, "--distill", "--teacher_checkpoint", str(checkpoint), "--resume"]) == 2
    assert "version_0 was started with teacher weights: " in capsys.readouterr().err
    load_classifier(checkpoint)


def test_other_versions_are_noted_and_resumed(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_for(make_folder(), "--baseline")
    assert experiment(flags) == 0
    interrupt("baseline")
    started = Path("logs/pets/baseline/version_0/started.json")
    started.write_text(re.sub(r'"torch": "[^"]*"', '"torch": "2.0"', started.read_text()))
    capsys.readouterr()
    assert experiment([*flags, "--resume"]) == 0
    assert "note: logs/pets/baseline/version_0 was started with torch: 2.0 (now " in capsys.readouterr().out


def test_diff_names_what_two_runs_differ_in(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_for(make_folder(), "--baseline")
    assert experiment(flags) == 0
    assert experiment([*flags, "--learning_rate", "0.002"]) == 0
    assert experiment(flags) == 0
    capsys.readouterr()
    first, second, third = (f"logs/pets/baseline/version_{version}" for version in range(3))
    assert main(["diff", first, f"{second}/checkpoints/best.ckpt"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"learning_rate\W+0.001\W+0.002\W", output)
    assert "seed" not in output
    assert main(["diff", first, third]) == 0
    assert "No differences" in capsys.readouterr().out
    assert experiment([*flags, "--seed", "5"]) == 0
    capsys.readouterr()
    assert main(["diff", first, "logs/pets/baseline/version_3"]) == 0
    assert f"seed 0 in {first}, seed 5 in logs/pets/baseline/version_3" in capsys.readouterr().out
    assert main(["diff", first, "logs/pets"]) == 2
    assert "logs/pets: not the folder of a run" in capsys.readouterr().err


def test_the_report_marks_experiments_on_different_validation_images(make_folder: MakeFolder) -> None:
    for name in ("one", "two"):
        folder = make_folder(name, val=5 if name == "one" else 4)
        assert experiment(flags_for(folder, "--baseline", name=name)) == 0
    assert main(["report", "logs/one", "logs/two", "--output", "both"]) == 0
    for suffix in ("html", "md"):
        assert "Measured on different validation images" in Path("both", f"report.{suffix}").read_text()
    page = Path("logs/one/report.html").read_text()
    assert re.search(r"<td>validation images</td><td>15 images in 3 classes, content \w{16}</td>", page)
    assert re.search(r"<td>torch</td><td>\d", page)
