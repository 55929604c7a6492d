"""Images of different splits that look alike."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kd.cli import main
from kd.data import LabeledImages, examine, find_near_duplicates, load_image

imagehash = pytest.importorskip("imagehash")


def photograph(seed: int) -> Image.Image:
    """Return smooth noise, as varied as photographs are."""
    noise = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC)


def images_of(folder: Path, images: list[Image.Image]) -> LabeledImages:
    folder.mkdir(parents=True)
    files = [folder / f"{number}.jpg" for number in range(len(images))]
    for path, image in zip(files, images, strict=True):
        image.save(path, quality=95)
    listed = LabeledImages(("a", "b"), [0] * len(files), list(map(str, files)), lambda i: load_image(files[i]), files)
    return examine(listed)[0]


def test_other_versions_of_a_photograph_are_found(tmp_path: Path) -> None:
    train = images_of(tmp_path / "train", [photograph(seed) for seed in range(40)])
    versions = [
        photograph(3).resize((64, 64)),
        photograph(7).filter(ImageFilter.GaussianBlur(1)),
        photograph(12).point(lambda value: min(255, int(value * 1.1))),
    ]
    others = [photograph(seed) for seed in range(100, 140)]
    val = images_of(tmp_path / "val", [*versions, *others])
    pairs = find_near_duplicates(train, val)
    assert pairs == [(str(train.files[old]), str(val.files[new])) for new, old in enumerate((3, 7, 12))]


def test_equal_files_and_images_of_one_tone_are_left_out(tmp_path: Path) -> None:
    plain = Image.new("RGB", (32, 32), (100, 100, 100))
    train = images_of(tmp_path / "train", [photograph(1), plain])
    val = images_of(tmp_path / "val", [photograph(1), Image.new("RGB", (32, 32), (50, 50, 50))])
    assert find_near_duplicates(train, val) == []
    assert len(find_near_duplicates(replace(train, digests=None), val) or ()) == 1


def test_check_reports_similar_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "photos"
    for split, seeds in (("train", range(24)), ("val", range(22, 46))):
        for name, offset in (("ant", 0), ("bee", 1_000)):
            smaller = [photograph(seed + offset).resize((90 if split == "val" else 96,) * 2) for seed in seeds]
            images_of(root / split / name, smaller)
    flags = ["--data_dir", str(root), "--image_size", "8", "--accelerator", "cpu", "--student_model", "linear"]
    assert main(["check", *flags, "--max_epochs", "40"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "4 of 48 validation images look like training images, which may inflate accuracy" in output
    assert "bee/0.jpg looks like" in output
