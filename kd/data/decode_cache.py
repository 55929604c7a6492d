"""A store of decoded images: each file is decoded once, made smaller, and read from one large file ever after."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from kd.data.images import LabeledImages
from kd.errors import UserError

_VERSION = 2
_PIXELS, _INDEX = "pixels.u8", "index.json"
_CHUNK = 256
_AT_ONCE = 4
_MEASURED = 32

Progress = Callable[[int, int], None]
"""Told how many images are done, of how many."""


@dataclass(frozen=True)
class CacheLimits:
    """How much a store may take: these shares of what the disk has free and of the machine's memory.

    A store that does not fit into memory would be read from the disk again in each epoch, more slowly than the files.

    Args:
        disk: Share of the free disk, a fraction of 1.
        memory: Share of the memory, a fraction of 1.
    """

    disk: float = 0.2
    memory: float = 0.5

    def holds(self, size: int, folder: Path) -> bool:
        """Say whether so many bytes may be put into a folder."""
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return size <= self.disk * shutil.disk_usage(there).free and size <= self.memory * memory


def cache_decoded(
    images: LabeledImages,
    side: int,
    folder: Path,
    *,
    limits: CacheLimits | None = None,
    progress: Progress | None = None,
) -> LabeledImages:
    """Return the same images, read from a store, which is written first where it is not there.

    An image whose short side is longer than ``side`` is made smaller, as the plain view does it, so that a plain view
    of that size is the same to the last bit; another one stays as it is. The store goes by the images' fingerprint
    (path, size and time of change of each file). It is written beside its place and moved there; of several processes
    that want it one writes, and the others wait; what a killed one left is written over.

    Args:
        images: The images.
        side: The longest that a short side stays, in pixels.
        folder: Folder of all stores.
        limits: How much it may take; ``None``: as much as it needs.
        progress: Told how far it is.

    Returns:
        The images; those that were given, if they have no files, or the store would take too much limits.

    Raises:
        UserError: If an image can't be decoded.
        OSError: If the store can't be written.
    """
    if not images.files or images.fingerprint is None:
        return images
    place = folder / hashlib.blake2b(f"{_VERSION} {side} {images.fingerprint}".encode(), digest_size=16).hexdigest()
    sizes = _sizes_in(place, len(images))
    if sizes is None:
        if limits is not None and not limits.holds(_estimate(images, side), folder):
            return images
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            # Another process may have been the first.
            sizes = _sizes_in(place, len(images)) or _write(images, side, place, progress)
    return replace(images, load=CachedPixels(place / _PIXELS, sizes), cached_side=side)


def _sizes_in(place: Path, count: int) -> list[tuple[int, int]] | None:
    """Read the heights and widths of the images in a store; ``None`` where there is none, or none that is whole."""
    try:
        written = json.loads((place / _INDEX).read_text(encoding="utf-8"))["sizes"]
        sizes = [(int(height), int(width)) for height, width in written]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    is_whole = len(sizes) == count and all(height > 0 and width > 0 for height, width in sizes)
    return sizes if is_whole else None


class CachedPixels:
    """Reads images from the large file, of which the system keeps one copy in memory for all processes.

    It is read and not mapped: what is mapped counts as a process's own memory, which would grow with the images that it
    has seen, and to read is as fast.
    """

    def __init__(self, path: Path, sizes: Sequence[tuple[int, int]]) -> None:
        self.path = path
        self.sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        lengths = 3 * self.sizes.prod(axis=1)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def size_of(self, index: int) -> tuple[int, int]:
        """Return an image's height and width."""
        height, width = self.sizes[index].tolist()
        return height, width

    def __call__(self, index: int) -> Tensor:
        """Read an image ``(3, H, W)``, uint8."""
        pixels = np.empty((*self.sizes[index], 3), dtype=np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.starts[index])
            length = file.readinto(pixels.data)
        if length < pixels.nbytes:
            raise UserError(f"{self.path}: this store of decoded images is cut short; delete it, and it is made again")
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _write(images: LabeledImages, side: int, place: Path, progress: Progress | None) -> list[tuple[int, int]]:
    beside = place.with_suffix(".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    sizes: list[tuple[int, int]] = []
    # Threads, as Pillow decodes outside of Python's lock.
    with (beside / _PIXELS).open("wb") as file, ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as threads:
        for start in range(0, len(images), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(images)))
            for pixels in threads.map(partial(_load_smaller, images, side), indices):
                file.write(pixels.permute(1, 2, 0).contiguous().numpy().data)
                sizes.append((pixels.shape[1], pixels.shape[2]))
            if progress is not None:
                progress(len(sizes), len(images))
        file.flush()
        os.fsync(file.fileno())
    (beside / _INDEX).write_text(json.dumps({"side": side, "sizes": sizes}), encoding="utf-8")
    # Where a store without its index was left, it is not one.
    shutil.rmtree(place, ignore_errors=True)
    beside.replace(place)
    return sizes


def _load_smaller(images: LabeledImages, side: int, index: int) -> Tensor:
    pixels = images.load(index)
    if min(pixels.shape[1:]) <= side:
        return pixels
    smaller: Tensor = v2.functional.resize(pixels, [side], antialias=True)
    return smaller


def _estimate(images: LabeledImages, side: int) -> int:
    """Estimate the bytes of a store from the sizes of some images, of which the heads alone are read."""
    which = torch.linspace(0, len(images) - 1, min(_MEASURED, len(images))).round().long().tolist()
    total = 0.0
    for index in which:
        with Image.open(images.files[index]) as image:
            short, long = sorted(image.size)
        scale = min(1.0, side / short)
        total += 3 * math.ceil(short * scale) * math.ceil(long * scale)
    return round(total / len(which) * len(images))
