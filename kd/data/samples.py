"""Samples of sharded archives: an image and its label, ``KEY.jpg`` and ``KEY.cls``, as webdataset stores them."""

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kd.data.folders import load_image
from kd.errors import UserError
from kd.pixels import IMAGE_SUFFIXES

LABEL = "cls"
MARK_EVERY = 50
# Files that webdataset ignores as metadata of the archive.
_METADATA = re.compile(r"__[^/]*__($|/)")
_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Shard:
    """An archive of a number of images, at a path or a URL that webdataset can open.

    Labels and keys of the images are only read for validation images. ``marks`` are the byte offsets of every
    `MARK_EVERY`-th sample, from which an archive on disk can be read. ``digest`` is a hash of the archive's content, or
    empty if the index was written by an earlier version.
    """

    name: str
    url: str
    images: int
    labels: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    marks: tuple[int, ...] = ()
    digest: str = ""


class Sample(NamedTuple):
    """An encoded image and its label, with its archive and, if that was read from the beginning, byte offset there.

    ``key`` is the image's file name within the archive, on which its random views depend.
    """

    key: str
    label: int
    encoded: bytes
    url: str
    offset: int

    def decode(self) -> Tensor:
        """Decode the image to ``(3, H, W)``, uint8."""
        return load_image(io.BytesIO(self.encoded), f"{self.url}, {self.key}")


def import_webdataset() -> Any:  # noqa: ANN401 (a module without types)
    """Import webdataset, an optional dependency."""
    try:
        import webdataset
    except ImportError:
        problem = "webdataset is not installed; run pip install webdataset (part of the extra shards)"
        raise UserError(f"--dataset webdataset: {problem}") from None
    return webdataset


def read_samples(
    shard: Shard, first: int = 0, last: int | None = None, *, classes: int, labels_only: bool = False
) -> Iterator[Sample]:
    """Read the samples ``first`` to ``last`` - 1 of a shard, by default all; an invalid one is an error."""
    is_file = Path(shard.url).is_file()
    mark = first // MARK_EVERY if shard.marks and is_file else 0
    count = mark * MARK_EVERY
    split_name = import_webdataset().tariterators.base_plus_ext
    try:
        with _open(shard.url, shard.marks[mark] if mark else 0, seekable=is_file) as archive:
            files = (info for info in archive if info.isreg() and not _METADATA.match(info.name))
            named = ((*split_name(info.name), info) for info in files)
            for key, group in groupby((each for each in named if each[0] is not None), itemgetter(0)):
                # The archive would otherwise keep the headers of all files in memory.
                archive.members = []  # type: ignore[attr-defined]
                count += 1
                if count > first:
                    parts = [
                        (suffix, info.offset, b"" if labels_only and suffix.lower() != LABEL else _read(archive, info))
                        for _, suffix, info in group
                    ]
                    yield _sample(key, parts, shard.url, classes)
                if count == last:
                    return
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{shard.url}: this shard can't be read: {reason}") from None
    if last is not None:
        problem = f"this shard has {count} samples, but its index says {shard.images}; count it again"
        raise UserError(f"{shard.url}: {problem}")


@contextmanager
def _open(url: str, offset: int, *, seekable: bool) -> Iterator[tarfile.TarFile]:
    opened = import_webdataset().gopen(url)
    try:
        if offset:
            opened.seek(offset)
        with tarfile.open(fileobj=opened, mode="r:" if seekable else "r|*") as archive:
            yield archive
    finally:
        if hasattr(opened, "ignore_errors"):
            # A command in a pipe fails when it is closed early; missing samples are detected by counting.
            opened.ignore_errors = True
        opened.close()


def _read(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(info)
    return b"" if file is None else file.read()


def _sample(key: str, parts: Sequence[tuple[str, int, bytes]], url: str, classes: int) -> Sample:
    """Return the sample whose files have these suffixes, offsets and contents."""
    images = [(suffix, content) for suffix, _, content in parts if suffix.lower() in _IMAGES]
    labels = [(suffix, content) for suffix, _, content in parts if suffix.lower() == LABEL]
    if not labels:
        raise UserError(f"{url}: sample {key} has no label; add {key}.{LABEL} next to its image in the archive")
    if len(images) != 1:
        found = "no image" if not images else f"{len(images)} images"
        raise UserError(f"{url}: sample {key} has {found}; it needs one, such as {key}.jpg, next to its label")
    (suffix, text), (image, encoded) = labels[0], images[0]
    try:
        label = int(text)
    except ValueError:
        problem = f"must be an integer, not {text[:20].decode(errors='replace')!r}"
        raise UserError(f"{url}: label {key}.{suffix} {problem}") from None
    if not 0 <= label < classes:
        problem = f"is {label}, but classes.txt has {classes} classes (0 to {classes - 1})"
        raise UserError(f"{url}: label {key}.{suffix} {problem}")
    return Sample(f"{key}.{image}", label, encoded, url, parts[0][1])
