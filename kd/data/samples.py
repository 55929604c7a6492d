"""The samples of a sharded archive: an image and its label, ``KEY.jpg`` and ``KEY.cls``, in the archive's order."""

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
"""Samples from one mark to the next."""

# What webdataset takes for a note about the archive.
_NOTE = re.compile(r"__[^/]*__($|/)")
_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Shard:
    """An archive.

    Args:
        name: What it goes by: folder and file, within the folder of the data.
        url: Where it lies: a path, or what webdataset opens.
        images: How many it holds.
        labels: The label of each; kept of validation images alone, which are few.
        keys: The key of each, likewise.
        marks: Where every so many samples begin, in bytes; an archive on a disk is read from there on.
    """

    name: str
    url: str
    images: int
    labels: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    marks: tuple[int, ...] = ()


class Sample(NamedTuple):
    """An image as it is encoded.

    Args:
        key: Its file's name within the archive; its views hang on it.
        label: Its class.
        encoded: The bytes of its file.
        url: Where the archive lies.
    """

    key: str
    label: int
    encoded: bytes
    url: str

    def decode(self) -> Tensor:
        """Decode it: ``(3, H, W)``, uint8.

        Raises:
            UserError: If it can't be decoded.
        """
        return torch.from_numpy(np.array(decode(io.BytesIO(self.encoded), f"{self.url}, {self.key}"))).permute(2, 0, 1)


class Member(NamedTuple):
    """Where an image lies within its archive.

    Args:
        key: Its file's name.
        label: Its class.
        offset: Where its bytes begin.
        size: How many these are.
        begin: Where its sample begins.
    """

    key: str
    label: int
    offset: int
    size: int
    begin: int


def import_webdataset() -> Any:  # noqa: ANN401 (a module without types)
    """Return webdataset, which is imported where it is asked for alone.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import webdataset
    except ImportError:
        raise UserError(
            "--dataset webdataset takes the package webdataset: pip install webdataset (it is in the extra shards)"
        ) from None
    return webdataset


def stream(shard: Shard, first: int, last: int, *, classes: int) -> Iterator[Sample]:
    """Read the samples of an archive from one to another, in their order; those before, or since a mark, are read past.

    Args:
        shard: The archive.
        first: Number of the first sample.
        last: Number after that of the last one.
        classes: Number of classes.

    Raises:
        UserError: If the archive can't be read, is not as it was when it was counted, or a sample is incomplete.
    """
    mark = first // MARK_EVERY if shard.marks and Path(shard.url).is_file() else 0
    seen = mark * MARK_EVERY
    try:
        with _opened(shard.url, shard.marks[mark] if mark else 0) as files:
            for parts in files:
                seen += 1
                if seen > first:
                    yield _sample(parts, shard.url, classes)
                if seen == last:
                    return
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{shard.url}: this shard can't be read: {_first_line(error)}") from None
    raise UserError(f"{shard.url}: this shard holds {seen} samples, and {shard.images} were counted in it before")


@contextmanager
def _opened(url: str, offset: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Open an archive and group its files to samples, as they come; from some byte on, if it is a file."""
    library = import_webdataset()
    opened = library.gopen(url)
    try:
        if offset:
            opened.seek(offset)
        files = library.tariterators.tar_file_expander([{"url": url, "stream": opened}])
        yield library.tariterators.group_by_keys(files, lcase=False)
    finally:
        if hasattr(opened, "ignore_errors"):
            # A command that nobody listens to any more ends with an error of its own; what it did not send is missed.
            opened.ignore_errors = True
        opened.close()


def members(path: Path, *, classes: int) -> list[Member]:
    """Look through an archive on the disk, without reading its images.

    Raises:
        UserError: If it can't be read, or a sample is incomplete.
    """
    library, found = import_webdataset(), list[Member]()
    key, parts, label = "", dict[str, Any](), b""
    try:
        with tarfile.open(path, "r:") as archive:
            for one in archive:
                stem, suffix = library.tariterators.base_plus_ext(one.name)
                if stem is None or not one.isreg() or _NOTE.match(one.name):
                    continue
                if parts and stem != key:
                    found.append(_member(parts, key, label, path, classes))
                    parts = {}
                key, parts[suffix] = stem, one
                if suffix.lower() == LABEL:
                    file = archive.extractfile(one)
                    label = b"" if file is None else file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: this shard can't be read: {_first_line(error)}") from None
    if parts:
        found.append(_member(parts, key, label, path, classes))
    return found


def _member(parts: Mapping[str, tarfile.TarInfo], key: str, label: bytes, path: Path, classes: int) -> Member:
    image, which = _complete(parts, key, str(path))
    held = parts[image]
    return Member(
        key=f"{key}.{image}",
        label=_label(label, which, key, str(path), classes),
        offset=held.offset_data,
        size=held.size,
        begin=min(one.offset for one in parts.values()),
    )


def _sample(parts: Mapping[str, Any], url: str, classes: int) -> Sample:
    key = parts["__key__"]
    image, label = _complete(parts, key, url)
    return Sample(f"{key}.{image}", _label(parts[label], label, key, url, classes), parts[image], url)


def _complete(parts: Mapping[str, Any], key: str, url: str) -> tuple[str, str]:
    """Return the endings of a sample's image and of its label."""
    images = [suffix for suffix in parts if suffix.lower() in _IMAGES]
    labels = [suffix for suffix in parts if suffix.lower() == LABEL]
    if not labels:
        raise UserError(f"{url}: the sample {key} has no label, {key}.{LABEL}")
    if len(images) != 1:
        what = "no image" if not images else f"{len(images)} images"
        raise UserError(f"{url}: the sample {key} has {what}; it takes one, such as {key}.jpg")
    return images[0], labels[0]


def _label(text: bytes, suffix: str, key: str, url: str, classes: int) -> int:
    try:
        label = int(text)
    except ValueError:
        shown = text[:20].decode(errors="replace")
        raise UserError(f"{url}: the label {key}.{suffix} is no whole number: {shown!r}") from None
    if not 0 <= label < classes:
        raise UserError(
            f"{url}: the label {key}.{suffix} is {label}, and classes.txt names {classes} classes (0 to {classes - 1})"
        )
    return label


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
