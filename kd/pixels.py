"""Decode an image file and resize it to a square input, with Pillow and numpy only, as exported students use it."""

import functools
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from kd.errors import UserError

_BYTE = 255
_LONGEST = 100
"""Aspect ratio beyond which only the center of an image is used: enlarging a strip of one pixel takes gigabytes."""

_LFS_POINTER = b"version https://git-lfs"
_HEIF_BRANDS = (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1")
_HEAD = 256
_HEIF_REMEDY = "HEIC, which needs pillow-heif: pip install pillow-heif"

# Such metadata are ignored; `kd check` would otherwise print a warning for each image.
warnings.filterwarnings("ignore", message="Corrupt EXIF data")

# Photographs with long comments or color profiles are legitimate; Pillow's limit is 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20

# As torchvision's ImageFolder, and the formats that Pillow has learned since.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2"),
)


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Open an image file of any format that Pillow or, if it is installed, pillow-heif decodes, whatever its suffix."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if not _register_heif():
            raise
    if not isinstance(file, Path):
        file.seek(0)
    return Image.open(file)


def is_image(file: Path) -> bool:
    """Return whether a file is an image, judging by its beginning."""
    try:
        open_image(file).close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


@functools.cache
def _register_heif() -> bool:
    """Add the formats of pillow-heif to Pillow; return whether it is installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        return True
    return False


def decode(file: Path | BinaryIO, name: str = "", pixel_range: tuple[float, ...] = ()) -> Image.Image:
    """Decode an image file: RGB, upright, 8 bits; of a very long strip only its center.

    Args:
        file: The file.
        name: Its name in error messages.
        pixel_range: The gray values that become 0 and 255, for images of more than 8 bits; empty: each image's own
            smallest and largest.

    Raises:
        UserError: If it can't be decoded.
    """
    try:
        with open_image(file) as image:
            upright = _upright(image)
            if upright.mode.startswith("I") or upright.mode == "F":
                upright = Image.fromarray(_to_eight_bits(np.asarray(upright), upright.mode, pixel_range))
            return _without_ends(upright).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        shown = name or str(file)
        raise UserError(f"{shown}: this image can't be decoded: {why_not_decoded(error, shown, file)}") from None


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF data says; as it is, if they are malformed."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 (malformed data make Pillow raise anything)
        return image


def orientation(image: Image.Image) -> int:
    """Return an image's EXIF orientation; 1, upright, if there is none or the data are malformed."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 (malformed data make Pillow raise anything)
        return 1


def _without_ends(image: Image.Image) -> Image.Image:
    """Return the center of a very long strip; other images as they are."""
    most = _LONGEST * min(image.size)
    if max(image.size) <= most:
        return image
    width, height = (min(length, most) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _to_eight_bits(values: NDArray[Any], mode: str, pixel_range: tuple[float, ...]) -> NDArray[np.uint8]:
    """Scale deeper gray values to 8 bits, which Pillow would clip to white.

    Without a range, whole numbers from 0 to 255 are kept, floating-point values from 0 to 1 are multiplied by 255, and
    others are stretched from the image's smallest to its largest value.
    """
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = pixel_range or (float(finite.min()), float(finite.max()))
    kept = 1 if mode == "F" and high <= 1 else _BYTE
    if not pixel_range and low >= 0 and high <= kept:
        low, high = 0, kept
    stretched = (finite - low) * (_BYTE / max(high - low, 1e-12))
    return stretched.round().clip(0, _BYTE).astype(np.uint8)


def why_not_decoded(error: Exception, shown: str, file: Path | BinaryIO) -> str:
    """Return why Pillow can't decode a file; ``shown`` is its name in Pillow's message."""
    if isinstance(error, UnidentifiedImageError):
        return _describe_content(file)
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        count = f"the {int(pixels[0]):,} pixels that its header claims" if pixels else "its pixels"
        return f"{count} are too many to be decoded safely"
    reason = str(error).replace(repr(shown), "it").replace(shown, "it")
    return "truncated or damaged" if reason == "could not create decoder object" else reason


def _describe_content(file: Path | BinaryIO) -> str:
    """Return what a file that is no image holds, judging by its beginning."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
    else:
        file.seek(0)
        head = file.read(_HEAD)
    if not head:
        return "it is empty"
    if head.startswith(_LFS_POINTER):
        return "it is a Git LFS pointer; run `git lfs pull` to fetch the image"
    if any(brand in head[:16] for brand in _HEIF_BRANDS):
        return _HEIF_REMEDY
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not an image"
    return "it is no image, or its beginning is damaged"


def plain_side(size: int) -> int:
    """Return the length of the resized short side, in pixels, from which a center square of ``size`` is cropped."""
    return round(size * 8 / 7)


def square(image: Image.Image, size: int, resize: str = "crop") -> NDArray[np.float32]:
    """Return the validation view of an RGB image, ``(3, size, size)``, float32 in [0, 1].

    ``resize`` is ``crop`` (short side to 8/7 of ``size``, then center crop) or ``squash`` (ignoring the aspect ratio).
    """
    if resize == "squash":
        view = image.resize((size, size), Image.Resampling.BILINEAR)
    else:
        side, short = plain_side(size), min(image.size)
        width, height = (side if length == short else int(side * length / short) for length in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        smaller = image.resize((width, height), Image.Resampling.BILINEAR)
        view = smaller.crop((left, top, left + size, top + size))
    return np.asarray(view, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
