import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd.data import load_image, read_folder, read_splits, read_unlabeled
from kd.errors import UserError
from tests.conftest import MakeFolder


def test_classes_are_the_folders_sorted_as_text(tmp_path: Path) -> None:
    for name in ("2", "10", "b", "A"):
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "d" / name / "x.png")
    images = read_folder(tmp_path / "d")
    assert images.classes == ("10", "2", "A", "b")
    assert images.keys == ["10/x.png", "2/x.png", "A/x.png", "b/x.png"]
    assert list(images.labels) == [0, 1, 2, 3]


def test_images_may_lie_deeper_and_litter_is_passed_over(tmp_path: Path, make_folder: MakeFolder) -> None:
    root = make_folder(train=2)
    (root / "train" / "ant" / "deep").mkdir()
    Image.new("L", (4, 4)).save(root / "train" / "ant" / "deep" / "x.JPEG", format="JPEG")
    for name in (".DS_Store", "Thumbs.db"):
        (root / "train" / "ant" / name).write_bytes(b"litter")
    (root / "train" / ".cache").mkdir()
    splits = read_splits(root)
    assert len(splits.train) == 7
    assert "ant/deep/x.JPEG" in splits.train.keys
    assert splits.name == "photos"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("missing", "there is no such folder"),
        ("no_val", r"val: there is no such folder \(--val_data names it; folders in .*: train\)"),
        ("empty", "has no class folders"),
        ("one_class", "there is one class only, 'ant'"),
        ("empty_class", "bee: this class has no images"),
        ("text", r"ant/notes.txt: this file is no image \(images end in .jpg"),
        ("fake", "ant/fake.jpg: this file is no image, whatever its name says"),
        ("zero", "ant/zero.png: this file is empty"),
        ("dangling", "ant/gone.png: this file can't be read: No such file or directory"),
        ("other_classes", r"differ in their classes; only in .*train: cat; only in .*val: dog"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_refused_with_the_path(
    make_folder: MakeFolder, tmp_path: Path, spoil: str, words: str
) -> None:
    root = make_folder(train=1, val=1)
    ant = root / "train" / "ant"
    if spoil == "missing":
        root = tmp_path / "absent"
    elif spoil == "no_val":
        (root / "val").rename(tmp_path / "elsewhere")
    elif spoil == "empty":
        (root / "train").rename(tmp_path / "elsewhere")
        (root / "train").mkdir()
    elif spoil == "one_class":
        for name in ("bee", "cat"):
            (root / "train" / name).rename(tmp_path / name)
    elif spoil == "empty_class":
        (root / "train" / "bee" / "0.png").unlink()
    elif spoil == "dangling":
        (ant / "gone.png").symlink_to(tmp_path / "nowhere.png")
    elif spoil == "other_classes":
        (root / "val" / "cat").rename(root / "val" / "dog")
    else:
        name, content = {"text": ("notes.txt", b"hi"), "fake": ("fake.jpg", b"GIF?"), "zero": ("zero.png", b"")}[spoil]
        (ant / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_splits(root)


def test_every_kind_of_image_becomes_three_channels_of_bytes(tmp_path: Path) -> None:
    gray = Image.fromarray(np.full((4, 6), 100, dtype=np.uint8))
    for name, image in {
        "gray.png": gray,
        "palette.png": gray.convert("RGB").quantize(4),
        "alpha.png": gray.convert("RGBA"),
        "cmyk.jpg": gray.convert("RGB").convert("CMYK"),
        "bits.bmp": gray,
        "web.webp": gray.convert("RGB"),
        "deep.png": Image.fromarray(np.full((4, 6), 100 * 256 + 7, dtype=np.uint16)),
    }.items():
        image.save(tmp_path / name)
        pixels = load_image(tmp_path / name)
        assert (tuple(pixels.shape), pixels.dtype) == ((3, 4, 6), torch.uint8), name
        assert (pixels.int() - 100).abs().max() <= 2, name


def test_photographs_are_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert tuple(load_image(tmp_path / "turned.jpg").shape) == (3, 6, 4)


def test_an_image_that_breaks_off_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, format="PNG")
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[:500])
    with pytest.raises(UserError, match=r"half.png: this image can't be decoded"):
        load_image(tmp_path / "half.png")


def test_an_unlabeled_folder_must_hold_images_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "more"
    with pytest.raises(UserError, match=r"--unlabeled_data .*more: there is no such folder"):
        read_unlabeled(folder)
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / ".hidden").touch()
    with pytest.raises(UserError, match=r"--unlabeled_data .*more: this folder holds no images"):
        read_unlabeled(folder)
    (folder / "deep" / "notes.txt").write_text("none")
    with pytest.raises(
        UserError, match=r"--unlabeled_data .*more: .*notes.txt: this file is no image .*; it holds images alone"
    ):
        read_unlabeled(folder)
