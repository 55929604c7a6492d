"""Samples of a sharded archive: an image and its label, ``KEY.jpg`` and ``KEY.cls``, as webdataset stores them."""

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd.errors import UserError
from kd.pixels import IMAGE_SUFFIXES, decode

LABEL = "cls"
MARK_EVERY = 50
"""Number of samples between two marks of a shard."""

# Files that webdataset ignores as metadata of the archive.
_METADATA = re.compile(r"__[^/]*__($|/)")
_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Shard:
    """An archive of samples.

    Args:
        name: Its folder and file name within the folder of the data set.
        url: Its path, or a URL that webdataset can open.
        images: Number of images.
        labels: Label of each image; only known for validation images.
        keys: Key of each image, likewise.
        marks: Byte offsets of every fiftieth sample, from which an archive on disk can be read.
    """

    name: str
    url: str
    images: int
    labels: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    marks: tuple[int, ...] = ()


class Sample(NamedTuple):
    """An encoded image and its label.

    Attributes:
        key: The image's file name within the archive; its random views depend on it.
        label: The label.
        encoded: The bytes of the image file.
        url: The archive.
    """

    key: str
    label: int
    encoded: bytes
    url: str

    def decode(self) -> Tensor:
        """Decode the image to ``(3, H, W)``, uint8.

        Raises:
            UserError: If it can't be decoded.
        """
        return torch.from_numpy(np.array(decode(io.BytesIO(self.encoded), f"{self.url}, {self.key}"))).permute(2, 0, 1)


class Member(NamedTuple):
    """Position of an image within its archive.

    Attributes:
        key: The image's file name.
        label: The label.
        offset: Offset of the image file's content, in bytes.
        size: Size of the image file, in bytes.
        begin: Offset of the sample, in bytes.
    """

    key: str
    label: int
    offset: int
    size: int
    begin: int


def import_webdataset() -> Any:  # noqa: ANN401 (a module without types)
    """Import webdataset, an optional dependency.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import webdataset
    except ImportError:
        raise UserError(
            "--dataset webdataset: webdataset is not installed; run pip install webdataset (part of the extra shards)"
        ) from None
    return webdataset


def stream(shard: Shard, first: int, last: int, *, classes: int) -> Iterator[Sample]:
    """Read consecutive samples of a shard.

    Args:
        shard: The shard; if it is on disk, it is read from the last mark before the first sample.
        first: Index of the first sample.
        last: Index after the last sample.
        classes: Number of classes.

    Raises:
        UserError: If the shard can't be read, has fewer samples than its index says, or a sample is invalid.
    """
    mark = first // MARK_EVERY if shard.marks and Path(shard.url).is_file() else 0
    count = mark * MARK_EVERY
    try:
        with _open(shard.url, shard.marks[mark] if mark else 0) as samples:
            for files in samples:
                count += 1
                if count > first:
                    key = files["__key__"]
                    image, label = _find_parts(files, key, shard.url)
                    number = _parse_label(files[label], f"{key}.{label}", shard.url, classes)
                    yield Sample(f"{key}.{image}", number, files[image], shard.url)
                if count == last:
                    return
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{shard.url}: this shard can't be read: {_first_line(error)}") from None
    raise UserError(f"{shard.url}: this shard has {count} samples, but its index says {shard.images}; count it again")


@contextmanager
def _open(url: str, offset: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Open an archive, from a byte offset if it is a file, and group its files into samples."""
    webdataset = import_webdataset()
    opened = webdataset.gopen(url)
    try:
        if offset:
            opened.seek(offset)
        files = webdataset.tariterators.tar_file_expander([{"url": url, "stream": opened}])
        yield webdataset.tariterators.group_by_keys(files, lcase=False)
    finally:
        if hasattr(opened, "ignore_errors"):
            # A command in a pipe fails when it is closed early; missing samples are noticed by their number.
            opened.ignore_errors = True
        opened.close()


def members(path: Path, *, classes: int) -> list[Member]:
    """List the images of a shard on disk without reading them.

    Raises:
        UserError: If the shard can't be read or a sample is invalid.
    """
    split_name = import_webdataset().tariterators.base_plus_ext
    samples: list[tuple[str, dict[str, tarfile.TarInfo], bytes]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                key, suffix = split_name(info.name)
                if key is None or not info.isreg() or _METADATA.match(info.name):
                    continue
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}, b""))
                _, files, label = samples[-1]
                files[suffix] = info
                if suffix.lower() == LABEL:
                    content = archive.extractfile(info)
                    label = b"" if content is None else content.read()
                samples[-1] = (key, files, label)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: this shard can't be read: {_first_line(error)}") from None
    found = []
    for key, files, text in samples:
        image, suffix = _find_parts(files, key, str(path))
        number = _parse_label(text, f"{key}.{suffix}", str(path), classes)
        begin = min(info.offset for info in files.values())
        found.append(Member(f"{key}.{image}", number, files[image].offset_data, files[image].size, begin))
    return found


def _find_parts(files: Mapping[str, Any], key: str, url: str) -> tuple[str, str]:
    """Return the suffixes of a sample's image and label."""
    images = [suffix for suffix in files if suffix.lower() in _IMAGES]
    labels = [suffix for suffix in files if suffix.lower() == LABEL]
    if not labels:
        raise UserError(f"{url}: sample {key} has no label; add {key}.{LABEL}")
    if len(images) != 1:
        found = "no image" if not images else f"{len(images)} images"
        raise UserError(f"{url}: sample {key} has {found}; it needs one, such as {key}.jpg")
    return images[0], labels[0]


def _parse_label(text: bytes, name: str, url: str, classes: int) -> int:
    try:
        label = int(text)
    except ValueError:
        raise UserError(f"{url}: label {name} must be an integer, not {text[:20].decode(errors='replace')!r}") from None
    if not 0 <= label < classes:
        raise UserError(f"{url}: label {name} is {label}, but classes.txt has {classes} classes (0 to {classes - 1})")
    return label


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
