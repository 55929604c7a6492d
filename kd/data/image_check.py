"""A check of image files before training: broken or unusual files, and files in both splits."""

import hashlib
import json
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache as memoized
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from kd.data.images import UNLABELED, LabeledImages
from kd.errors import UserError
from kd.files import write_text
from kd.pixels import decode, why_not_decoded

BROKEN = "broken"
_VERSION = 2
_THREADS = 4
_TAIL = 1024
_SAMPLE = 256
_MANY_PIXELS, _FEW_PIXELS = 50_000_000, 8
_LONG = 20
# How complete files of a format end. Files of other formats are decoded to find out whether they are complete.
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "TIFF")


class FileFinding(NamedTuple):
    """An unusual property of an image file; its kind is ``broken`` or one of those in `_check_header`."""

    kind: str
    path: str
    detail: str


def check_images(images: LabeledImages, *, cache: Path | None = None) -> list[FileFinding]:
    """Read the header and the end of each image file, and decode a sample: seconds for ten thousand images.

    Findings are kept in the folder ``cache``, identified by the fingerprint of the images.
    """
    if not images.files:
        return []
    path = None
    if cache is not None and images.fingerprint is not None:
        digest = hashlib.blake2b(f"{_VERSION} {images.fingerprint}".encode(), digest_size=16)
        path = cache / f"{digest.hexdigest()}.json"
        with suppress(OSError, ValueError, TypeError, RecursionError):
            return [FileFinding(*map(str, values)) for values in json.loads(path.read_text(encoding="utf-8"))]
    count = len(images.files)
    sample = set(random.Random(0).sample(range(count), min(_SAMPLE, count)))  # noqa: S311 (not a secret)
    # Threads suffice, as Pillow reads and decodes without holding the interpreter lock.
    with ThreadPoolExecutor(_THREADS) as threads:
        checks = threads.map(lambda index: _check_file(images.files[index], decodes=index in sample), range(count))
        findings = list(chain.from_iterable(checks))
    if path is not None:
        # If the cache can't be written, the files are checked again next time.
        with suppress(OSError):
            write_text(path, json.dumps(findings))
    return findings


def find_duplicates(train: LabeledImages, val: LabeledImages) -> list[tuple[Path, Path]]:
    """Return pairs of a training file and a validation file with the same content."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in train.files:
        by_size[path.stat().st_size].append(path)
    digest = memoized(lambda path: hashlib.blake2b(path.read_bytes(), digest_size=16).digest())
    pairs = []
    for path in val.files:
        same = (other for other in by_size.get(path.stat().st_size, []) if digest(other) == digest(path))
        pairs += [(other, path) for other in islice(same, 1)]
    return pairs


def drop_broken(images: LabeledImages, broken: Sequence[FileFinding]) -> LabeledImages:
    """Return the images without the broken files; a class without any other image is an error."""
    dropped = {finding.path for finding in broken} & set(map(str, images.files))
    if not dropped:
        return images
    kept = images.subset([index for index, path in enumerate(images.files) if str(path) not in dropped])
    for label in set(images.labels) - set(kept.labels) - {UNLABELED}:
        raise UserError(f"class {images.classes[label]!r}: all of its image files are broken")
    return kept


def _check_file(path: Path, *, decodes: bool) -> list[FileFinding]:
    try:
        # Pillow warns about properties that are checked here.
        with warnings.catch_warnings(action="ignore"):
            with Image.open(path) as image:
                findings = [FileFinding(kind, str(path), detail) for kind, detail in _check_header(image)]
                end = _ENDS.get(image.format or "")
            if decodes or end is None or end not in _tail(path):
                decode(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return [FileFinding(BROKEN, str(path), why_not_decoded(error, str(path)))]
    except UserError as error:
        return [FileFinding(BROKEN, str(path), str(error).partition("can't be decoded: ")[2] or str(error))]
    return findings


def _check_header(image: Image.Image) -> Iterator[tuple[str, str]]:
    """Yield the kind and the description of each finding that needs only the header."""
    width, height = image.size
    frames = getattr(image, "n_frames", 1)
    if image.mode == "CMYK":
        yield "cmyk", "converted to RGB without its color profile"
    if image.mode.startswith("I"):
        yield "16-bit", "only the upper 8 of its 16 bits are used"
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        yield "transparent", "transparency is ignored"
    if frames > 1 and image.format in _ANIMATED_FORMATS:
        yield "animated", f"only the first of its {frames} frames is used"
    if image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1):
        yield "turned", "rotated upright by its EXIF orientation"
    if width * height > _MANY_PIXELS:
        yield "large", f"{width} x {height} pixels"
    if min(width, height) < _FEW_PIXELS:
        yield "tiny", f"{width} x {height} pixels"
    if max(width, height) > _LONG * min(width, height):
        yield "long", f"{width} x {height} pixels; --resize crop shows only its center"


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL))
        return file.read()
