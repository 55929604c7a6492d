"""A cache of decoded images: each file is decoded and resized once, then read from one large file."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from kd.data.images import LabeledImages, evenly_spaced
from kd.errors import UserError
from kd.files import write_atomically, write_text

_VERSION = 2
_PIXELS, _INDEX = "pixels.u8", "index.json"
_CHUNK, _SAMPLE = 256, 32
_THREADS = 4


def room_for_cache(folder: Path) -> int:
    """Return the maximum size of a cache in bytes: a fifth of the free disk space, and at most half of the memory.

    A cache that doesn't fit into memory would be read from disk in each epoch, more slowly than the files.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(shutil.disk_usage(existing).free // 5, memory // 2)


def cache_decoded(
    images: LabeledImages,
    side: int,
    folder: Path,
    *,
    max_bytes: float = math.inf,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> LabeledImages:
    """Return the same images, read from a decode cache, which is written first if it doesn't exist.

    Images with a short side of more than ``side`` pixels are resized as by the plain view, so that a plain view of that
    size is bit-identical; others are kept as they are. A cache is identified by the fingerprint of the images. It is
    written atomically; of several processes, one writes, and the others wait. ``progress`` is called with the number of
    images done and their total. Images that don't come from files, or whose cache would be larger than ``max_bytes``,
    are returned unchanged.
    """
    if not images.files or images.fingerprint is None:
        return images
    path = folder / hashlib.blake2b(f"{_VERSION} {side} {images.fingerprint}".encode(), digest_size=16).hexdigest()
    sizes = _read_sizes(path, len(images))
    if sizes is None:
        if max_bytes < math.inf and _estimate_size(images, side) > max_bytes:
            return images
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            # Another process may have written it in the meantime.
            sizes = _read_sizes(path, len(images)) or _write(images, side, path, progress)
    return replace(images, load=CachedPixels(path / _PIXELS, sizes), cached_side=side)


def _read_sizes(path: Path, count: int) -> list[tuple[int, int]] | None:
    """Read the heights and widths of the images in a cache; ``None`` if it is missing or incomplete."""
    try:
        values = json.loads((path / _INDEX).read_text(encoding="utf-8"))["sizes"]
        sizes = [(int(height), int(width)) for height, width in values]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return sizes if len(sizes) == count and all(min(size) > 0 for size in sizes) else None


class CachedPixels:
    """Reads images from a cache's file: all images one after the other, each as ``(H, W, 3)``, uint8.

    Reading is as fast as memory-mapping, whose pages would count as the memory of each process.
    """

    def __init__(self, path: Path, sizes: Sequence[tuple[int, int]]) -> None:
        self.path = path
        self.sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        self.starts = np.concatenate([[0], np.cumsum(3 * self.sizes.prod(axis=1))])

    def __call__(self, index: int) -> Tensor:
        """Read an image ``(3, H, W)``, uint8."""
        pixels = np.empty((*self.sizes[index], 3), dtype=np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.starts[index])
            length = file.readinto(pixels.data)
        if length < pixels.nbytes:
            raise UserError(f"{self.path}: this cache of decoded images is truncated; delete it to have it rebuilt")
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _write(
    images: LabeledImages, side: int, path: Path, progress: Callable[[int, int], object]
) -> list[tuple[int, int]]:
    # Left by a killed process; the caller holds the lock.
    shutil.rmtree(path, ignore_errors=True)
    sizes: list[tuple[int, int]] = []
    # Threads suffice, as Pillow decodes without holding the interpreter lock.
    with write_atomically(path / _PIXELS) as file, ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        for start in range(0, len(images), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(images)))
            for pixels in threads.map(partial(_load_resized, images, side), indices):
                file.write(pixels.permute(1, 2, 0).contiguous().numpy().data)
                sizes.append((pixels.shape[1], pixels.shape[2]))
            progress(len(sizes), len(images))
    # The index is written last: a cache without one is incomplete.
    write_text(path / _INDEX, json.dumps({"side": side, "sizes": sizes}))
    return sizes


def _load_resized(images: LabeledImages, side: int, index: int) -> Tensor:
    pixels = images.load(index)
    return v2.functional.resize(pixels, [side], antialias=True) if min(pixels.shape[1:]) > side else pixels


def _estimate_size(images: LabeledImages, side: int) -> int:
    """Estimate the size of a cache in bytes from a sample of the images, of which only the headers are read."""
    sample, total = evenly_spaced(len(images), _SAMPLE), 0
    for index in sample:
        with Image.open(images.files[index]) as image:
            short, long = sorted(image.size)
        scale = min(1.0, side / short)
        total += 3 * math.ceil(short * scale) * math.ceil(long * scale)
    return round(total / len(sample) * len(images))
