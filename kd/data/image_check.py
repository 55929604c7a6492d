"""A check of image files before training: broken or unusual files, and files in both splits."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from kd.data.images import UNLABELED, LabeledImages
from kd.errors import UserError
from kd.pixels import decode, open_image, orientation, why_not_decoded

BROKEN = "broken"
_TAIL = 1024
_MANY_PIXELS, _FEW_PIXELS = 50_000_000, 8
_LONG = 20
# How complete files of a format end. Files of other formats are decoded to find out whether they are complete.
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
# Gray values of more than 8 bits, see :mod:`kd.pixels`.
_SCALED = "stretched from its smallest to its largest value unless these are those of 8 bits; --pixel_range fixes them"
_DEEP = {"I;16": ("16-bit", _SCALED), "I": ("16-bit", _SCALED), "F": ("float", _SCALED)}
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "TIFF")


class FileFinding(NamedTuple):
    """An unusual property of an image file; its kind is ``broken`` or one of those in `_check_header`."""

    kind: str
    path: str
    detail: str


def find_duplicates(first: LabeledImages, second: LabeledImages) -> list[tuple[str, str]]:
    """Return pairs of an image of each with the same content, by their names."""
    if first.digests is None or second.digests is None:
        return []
    by_content = {digest.tobytes(): index for index, digest in enumerate(first.digests)}
    return [
        (first.name_of(by_content[digest.tobytes()]), second.name_of(index))
        for index, digest in enumerate(second.digests)
        if digest.tobytes() in by_content
    ]


def drop_broken(images: LabeledImages, broken: Sequence[FileFinding]) -> LabeledImages:
    """Return the images without the broken files; a class without any other image is an error."""
    dropped = {finding.path for finding in broken} & set(map(str, images.files))
    if not dropped:
        return images
    kept = images.subset([index for index, path in enumerate(images.files) if str(path) not in dropped])
    for label in set(images.strata) - set(kept.strata) - {UNLABELED}:
        raise UserError(f"class {images.classes[label]!r}: all of its image files are broken")
    return kept


def check_file(path: Path, content: BinaryIO, *, decodes: bool) -> list[FileFinding]:
    """Check the header and the end of an image file; decode it if required or if its format has no recognizable end."""
    try:
        # Pillow warns about properties that are checked here.
        with warnings.catch_warnings(action="ignore"):
            with open_image(content) as image:
                findings = [FileFinding(kind, str(path), detail) for kind, detail in _check_header(image)]
                end = _ENDS.get(image.format or "")
            if end is None or end not in _tail(content) or decodes:
                content.seek(0)
                decode(content, str(path))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return [FileFinding(BROKEN, str(path), why_not_decoded(error, str(path), content))]
    except UserError as error:
        return [FileFinding(BROKEN, str(path), str(error).partition("can't be decoded: ")[2] or str(error))]
    return findings


def _check_header(image: Image.Image) -> Iterator[tuple[str, str]]:
    """Yield the kind and the description of each finding that needs only the header."""
    width, height = image.size
    frames = getattr(image, "n_frames", 1)
    if image.mode == "CMYK":
        yield "cmyk", "converted to RGB without its color profile"
    mode = "I;16" if image.mode.startswith("I;16") else image.mode
    if mode in _DEEP:
        yield _DEEP[mode]
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        yield "transparent", "transparency is ignored"
    if frames > 1 and image.format in _ANIMATED_FORMATS:
        yield "animated", f"only the first of its {frames} frames is used"
    if orientation(image) not in (0, 1):
        yield "turned", "rotated upright by its EXIF orientation"
    if width * height > _MANY_PIXELS:
        yield "large", f"{width} x {height} pixels"
    if min(width, height) < _FEW_PIXELS:
        yield "tiny", f"{width} x {height} pixels"
    if max(width, height) > _LONG * min(width, height):
        yield "long", f"{width} x {height} pixels; --resize crop shows only its center"


def _tail(content: BinaryIO) -> bytes:
    size = content.seek(0, 2)
    content.seek(max(0, size - _TAIL))
    return content.read()
