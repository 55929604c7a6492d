"""Decode an image file and resize it to a square input, with Pillow and numpy only, as exported students use it."""

import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from kd.errors import UserError

_BYTE, _TWO_BYTES = 255, 1 << 16

# As torchvision's ImageFolder.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def decode(file: Path | BinaryIO, name: str = "") -> Image.Image:
    """Decode an image file, called ``name`` in error messages: RGB, upright, 8 bits."""
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I") or upright.mode == "F":
                upright = Image.fromarray(_to_eight_bits(np.asarray(upright), upright.mode))
            return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        shown = name or str(file)
        raise UserError(f"{shown}: this image can't be decoded: {why_not_decoded(error, shown)}") from None


def _to_eight_bits(values: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    """Scale deeper gray values to 8 bits, which Pillow would clip to white.

    Whole numbers up to 255 are kept, up to 65,535 are taken as 16 bits, and larger ones are divided by the image's
    largest. Floating-point values from 0 to 1 are multiplied by 255, those up to 255 are kept, and others are stretched
    from the image's smallest to its largest.
    """
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(finite.min()), float(finite.max())
    if mode.startswith("I;16") or (mode != "F" and low >= 0 and _BYTE < high < _TWO_BYTES):
        return (values.astype(np.int64) >> 8).astype(np.uint8)
    if low >= 0 and high <= (1 if mode == "F" else _BYTE):
        finite = finite * (_BYTE if mode == "F" else 1)
    elif mode != "F":
        finite = finite.clip(min=0) * (_BYTE / max(high, 1))
    elif low < 0 or high > _BYTE:
        finite = (finite - low) * (_BYTE / max(high - low, 1e-12))
    return finite.round().clip(0, _BYTE).astype(np.uint8)


def why_not_decoded(error: Exception, shown: str) -> str:
    """Return why Pillow can't decode a file; ``shown`` is its name in Pillow's message."""
    if isinstance(error, UnidentifiedImageError):
        return "unknown format, or its beginning is damaged"
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        count = f"the {int(pixels[0]):,} pixels that its header claims" if pixels else "its pixels"
        return f"{count} are too many to be decoded safely"
    reason = str(error).replace(repr(shown), "it").replace(shown, "it")
    return "truncated or damaged" if reason == "could not create decoder object" else reason


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
