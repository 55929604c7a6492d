"""Looking at image files before they are trained on: what is broken, what is odd, and what stands in two places."""

import hashlib
import json
import random
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kd.data.images import LabeledImages
from kd.errors import UserError
from kd.pixels import decode, why_not_decoded

_VERSION = 2
_AT_ONCE = 4
_TAIL = 1024
_SAMPLE = 256
_LARGE = 50_000_000
_TINY = 8
_LONG = 20
_EXIF_ORIENTATION = 0x0112
# How a whole file of a format ends. A file of any other format is decoded to see whether it is whole.
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_ANIMATIONS = ("GIF", "WEBP", "PNG", "TIFF")

BROKEN = "broken"


@dataclass(frozen=True)
class FileFinding:
    """What is odd about an image file.

    Args:
        kind: ``broken``, ``cmyk``, ``16-bit``, ``transparent``, ``animated``, ``turned``, ``large``, ``tiny`` or
            ``long``.
        path: The file.
        detail: What exactly.
    """

    kind: str
    path: str
    detail: str


def check_images(images: LabeledImages, *, cache: Path | None = None) -> list[FileFinding]:
    """Look at the head and the end of each file, and decode some: seconds for ten thousand images.

    Args:
        images: The images; those that have no files are not looked at.
        cache: A folder where what was found is kept; it goes by the images' fingerprint (path, size and time of change
            of each file).

    Returns:
        What was found, in the order of the files.
    """
    if not images.files:
        return []
    kept = None
    if cache is not None and images.fingerprint is not None:
        name = hashlib.blake2b(f"{_VERSION} {images.fingerprint}".encode(), digest_size=16).hexdigest()
        kept = cache / f"{name}.json"
        found = _read(kept)
        if found is not None:
            return found
    # Evenly spread, and the same ones at each call.
    sample = set(random.Random(0).sample(range(len(images.files)), min(_SAMPLE, len(images.files))))  # noqa: S311
    # Threads, as Pillow reads and decodes outside of Python's lock.
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        looks = threads.map(lambda index: _look_at(images.files[index], decodes=index in sample), range(len(images)))
        found = [oddity for some in looks for oddity in some]
    if kept is not None:
        _write(found, kept)
    return found


def find_duplicates(train: LabeledImages, val: LabeledImages) -> list[tuple[Path, Path]]:
    """Find validation files that are, byte for byte, training files, too.

    Returns:
        Pairs of a training and a validation file.
    """
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in train.files:
        by_size[path.stat().st_size].append(path)
    pairs: list[tuple[Path, Path]] = []
    digests: dict[Path, bytes] = {}
    for path in val.files:
        for other in by_size.get(path.stat().st_size, []):
            if _digest(path, digests) == _digest(other, digests):
                pairs.append((other, path))
                break
    return pairs


def drop_broken(images: LabeledImages, broken: Sequence[FileFinding]) -> LabeledImages:
    """Return the images without those whose files are broken.

    Raises:
        UserError: If a class has no image left.
    """
    bad = {one.path for one in broken}
    kept = [index for index, path in enumerate(images.files) if str(path) not in bad]
    if len(kept) == len(images):
        return images
    left = {images.labels[index] for index in kept}
    for label, name in enumerate(images.classes):
        if label not in left:
            raise UserError(f"of the class {name!r} no image is left: all of its files are broken")
    return images.subset(kept)


def _look_at(path: Path, *, decodes: bool) -> list[FileFinding]:
    try:
        with warnings.catch_warnings():
            # What Pillow would warn of is looked at here.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                found = [FileFinding(kind, str(path), detail) for kind, detail in _oddities(image)]
                end = _ENDS.get(image.format or "")
            is_whole = end is not None and end in _tail(path)
            if decodes or not is_whole:
                decode(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return [FileFinding(BROKEN, str(path), why_not_decoded(error, str(path)))]
    except UserError as error:
        return [FileFinding(BROKEN, str(path), str(error).partition("can't be decoded: ")[2] or str(error))]
    return found


def _oddities(image: Image.Image) -> list[tuple[str, str]]:
    """Return what the head of a file tells: kinds, with the details."""
    found: list[tuple[str, str]] = []
    width, height = image.size
    if image.mode == "CMYK":
        found.append(("cmyk", "its four inks are made red, green and blue without its color profile"))
    if image.mode.startswith("I"):
        found.append(("16-bit", "of its 16 bits the upper 8 are taken"))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        found.append(("transparent", "what lies under the transparent parts is shown"))
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in _ANIMATIONS:
        found.append(("animated", f"the first of its {frames} pictures is taken"))
    if image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1):
        found.append(("turned", "it is set upright, as the camera noted"))
    if width * height > _LARGE:
        found.append(("large", f"{width} x {height} pixels"))
    if min(width, height) < _TINY:
        found.append(("tiny", f"{width} x {height} pixels"))
    if max(width, height) > _LONG * min(width, height):
        found.append(("long", f"{width} x {height} pixels; --resize crop shows its middle alone"))
    return found


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL))
        return file.read()


def _digest(path: Path, known: dict[Path, bytes]) -> bytes:
    if path not in known:
        known[path] = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    return known[path]


def _read(path: Path) -> list[FileFinding] | None:
    try:
        return [FileFinding(*map(str, one)) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _write(found: Sequence[FileFinding], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps([[one.kind, one.path, one.detail] for one in found]), encoding="utf-8")
        beside.replace(path)
    except OSError:
        # It is looked at again next time, and nothing else.
        return
