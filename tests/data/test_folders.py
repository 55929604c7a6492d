import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from kd.data import BROKEN, load_image, read_folder, read_splits, read_unlabeled
from kd.data.image_check import check_file
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
    }.items():
        image.save(tmp_path / name)
        pixels = load_image(tmp_path / name)
        assert (tuple(pixels.shape), pixels.dtype) == ((3, 4, 6), torch.uint8), name
        assert (pixels.int() - 100).abs().max() <= 2, name


DEEP: dict[str, tuple[NDArray[Any], str, list[int]]] = {
    "16 bits": (np.array([[0, 25_600, 65_535]], dtype=np.uint16), "png", [0, 100, 255]),
    "16 bits in PGM": (np.array([[0, 25_600, 65_535]], dtype=np.uint16), "pgm", [0, 100, 255]),
    "12 bits in 16": (np.array([[1_000, 2_000, 4_000]], dtype=np.uint16), "png", [0, 85, 255]),
    "8 bits in 16": (np.array([[10, 100, 200]], dtype=np.uint16), "png", [10, 100, 200]),
    "one value": (np.array([[300, 300]], dtype=np.uint16), "png", [0, 0]),
    "32-bit whole numbers": (np.array([[0, 1_000_000, 2_000_000]], dtype=np.int32), "tiff", [0, 128, 255]),
    "8 bits in 32": (np.array([[0, 100, 255]], dtype=np.int32), "tiff", [0, 100, 255]),
    "from 0 to 1": (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), "tiff", [0, 128, 255]),
    "from 0 to 255": (np.array([[0.0, 100.0, 255.0]], dtype=np.float32), "tiff", [0, 100, 255]),
    "any numbers": (np.array([[-2.0, 0.0, 2.0]], dtype=np.float32), "tiff", [0, 128, 255]),
    "not a number": (np.array([[0.0, np.nan, 1.0]], dtype=np.float32), "tiff", [0, 0, 255]),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_gray_values_are_scaled_to_8_bits(tmp_path: Path, name: str) -> None:
    values, suffix, expected = DEEP[name]
    image = Image.fromarray(values)
    (image.convert("I") if suffix == "pgm" else image).save(tmp_path / f"x.{suffix}")
    pixels = load_image(tmp_path / f"x.{suffix}")
    assert pixels[0, 0].tolist() == expected
    assert torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_a_range_of_gray_values_may_be_given(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.array([[0, 1_000, 3_000, 5_000, 9_000]], dtype=kind)).save(tmp_path / "x.tiff")
    pixels = load_image(tmp_path / "x.tiff", pixel_range=(1_000, 5_000))
    assert pixels[0, 0].tolist() == [0, 0, 128, 255, 255]
    # Images of 8 bits stay as they are.
    Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8)).save(tmp_path / "y.png")
    assert load_image(tmp_path / "y.png", pixel_range=(1_000, 5_000))[0, 0].tolist() == [0, 100, 255]


FORMATS = {"avif": "AVIF", "gif": "GIF", "jfif": "JPEG", "jp2": "JPEG2000", "heic": "HEIF", "tif": "TIFF"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_content_decides_on_the_format(tmp_path: Path, suffix: str) -> None:
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image = Image.fromarray(np.full((32, 48, 3), 100, dtype=np.uint8))
    for name in (f"x.{suffix}", "x.jpg", "x"):
        image.save(tmp_path / name, format=FORMATS[suffix])
        pixels = load_image(tmp_path / name)
        assert tuple(pixels.shape) == (3, 32, 48)
        assert (pixels.int() - 100).abs().max() <= 3


def test_malformed_metadata_do_not_keep_an_image_from_being_read(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((4, 6, 3), 100, dtype=np.uint8))
    image.save(tmp_path / "exif.jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff" + b"\x01" * 40)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    image.save(tmp_path / "text.png", pnginfo=text)
    image.save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
    for name in ("exif.jpg", "text.png", "profile.png"):
        assert tuple(load_image(tmp_path / name).shape) == (3, 4, 6)
        assert not [
            each
            for each in check_file(tmp_path / name, io.BytesIO((tmp_path / name).read_bytes()), decodes=True)
            if each.kind == BROKEN
        ]


def test_of_a_long_strip_only_the_center_is_used(tmp_path: Path) -> None:
    values = np.zeros((1, 60_001, 3), dtype=np.uint8)
    values[0, 30_000] = 255
    Image.fromarray(values).save(tmp_path / "x.png")
    pixels = load_image(tmp_path / "x.png")
    assert tuple(pixels.shape) == (3, 1, 100)
    assert pixels[0, 0].nonzero().flatten().tolist() == [50]


def test_a_big_tiff_is_read_and_eight_bands_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6, 3), 100, dtype=np.uint8)).save(tmp_path / "big.tif", big_tiff=True)
    assert (tmp_path / "big.tif").read_bytes()[2] == 43
    assert tuple(load_image(tmp_path / "big.tif").shape) == (3, 4, 6)


def test_a_deep_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 6), dtype=np.uint16)).save(tmp_path / "x.png", exif=exif)
    assert tuple(load_image(tmp_path / "x.png").shape) == (3, 6, 4)


def test_linked_folders_are_followed_once(tmp_path: Path, make_folder: MakeFolder) -> None:
    root, elsewhere = make_folder(train=2), tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (4, 4)).save(elsewhere / "x.png")
    (root / "train" / "ant" / "more").symlink_to(elsewhere, target_is_directory=True)
    # A loop.
    (elsewhere / "again").symlink_to(root / "train" / "ant", target_is_directory=True)
    keys = read_splits(root).train.keys
    assert [key for key in keys if key.endswith("x.png")] == ["ant/more/x.png"]
    assert len(keys) == len(set(keys)) == 7


def test_a_folder_that_can_not_be_read_is_named(
    tmp_path: Path, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(train=2)
    (root / "train" / "ant" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        # Root can read every folder.
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"locked: this folder can't be read: Permission denied"):
        read_splits(root)


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


def test_an_unlabeled_folder_must_contain_images(tmp_path: Path) -> None:
    folder = tmp_path / "unlabeled"
    with pytest.raises(UserError, match=r"--unlabeled_data .*unlabeled: there is no such folder"):
        read_unlabeled(folder)
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / ".hidden").touch()
    with pytest.raises(UserError, match=r"--unlabeled_data .*unlabeled: this folder has no images"):
        read_unlabeled(folder)
