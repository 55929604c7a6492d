import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd.data import load_image, read_folder, read_splits, read_unlabeled
from kd.errors import UserError
from tests.conftest import MakeFolder


def test_classes_are_the_folder_names_in_lexicographic_order(tmp_path: Path) -> None:
    for name in ("2", "10", "b", "A"):
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "d" / name / "x.png")
    images = read_folder(tmp_path / "d")
    assert images.classes == ("10", "2", "A", "b")
    assert images.keys == ["10/x.png", "2/x.png", "A/x.png", "b/x.png"]
    assert list(images.labels) == [0, 1, 2, 3]


def test_nested_images_are_found_and_system_files_are_ignored(tmp_path: Path, make_folder: MakeFolder) -> None:
    root = make_folder(train=2)
    (root / "train" / "ant" / "deep").mkdir()
    Image.new("L", (4, 4)).save(root / "train" / "ant" / "deep" / "x.JPEG", format="JPEG")
    for name in (".DS_Store", "Thumbs.db"):
        (root / "train" / "ant" / name).write_bytes(b"system file")
    (root / "train" / ".cache").mkdir()
    splits = read_splits(root)
    assert len(splits.train) == 7
    assert "ant/deep/x.JPEG" in splits.train.keys
    assert splits.name == "photos"


def test_every_image_mode_is_converted_to_uint8_rgb(tmp_path: Path) -> None:
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


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "rotated.jpg", exif=exif)
    assert tuple(load_image(tmp_path / "rotated.jpg").shape) == (3, 6, 4)


def test_a_truncated_image_is_an_error_with_its_path(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, format="PNG")
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[:500])
    with pytest.raises(UserError, match=r"half.png: this image can't be decoded"):
        load_image(tmp_path / "half.png")


def test_an_unlabeled_folder_must_contain_only_images(tmp_path: Path) -> None:
    folder = tmp_path / "unlabeled"
    with pytest.raises(UserError, match=r"--unlabeled_data .*unlabeled: there is no such folder"):
        read_unlabeled(folder)
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / ".hidden").touch()
    with pytest.raises(UserError, match=r"--unlabeled_data .*unlabeled: this folder has no images"):
        read_unlabeled(folder)
    (folder / "deep" / "notes.txt").write_text("none")
    with pytest.raises(UserError, match=r"--unlabeled_data .*unlabeled: .*notes.txt: this file is not an image"):
        read_unlabeled(folder)
