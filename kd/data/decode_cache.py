"""A cache of decoded images: each file is decoded and resized once, then read from one large file."""

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from xxhash import xxh3_64_intdigest

from kd.data.images import LabeledImages, evenly_spaced
from kd.files import write_atomically

_VERSION = 4
_PIXELS, INDEX_FILE = "pixels.u8", "index.npz"
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
    has_room: Callable[[int], bool] | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> LabeledImages:
    """Return the same images, read from a decode cache, which is written first if it doesn't exist.

    Images with a short side of more than ``side`` pixels are resized as by the plain view, so that a plain view of that
    size is bit-identical; others are kept as they are. A cache is identified by the fingerprint of the images. It is
    written atomically; of several processes, one writes, and the others wait. ``progress`` is called with the number of
    images done and their total. Images that don't come from files, or for whose cache ``has_room`` of the estimated
    size in bytes is false, are returned unchanged.
    """
    if not images.files or images.fingerprint is None or not len(images):
        return images
    key = f"{_VERSION} {side} {images.fingerprint}{images.pixel_range or ''}"
    path = folder / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    index = _read_index(path, len(images))
    if index is None:
        if has_room is not None and not has_room(_estimate_size(images, side)):
            return images
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            # Another process may have written it in the meantime.
            index = _read_index(path, len(images)) or _write(images, side, path, progress)
    load = CachedPixels(path / _PIXELS, index, partial(_load_resized, images, side))
    return replace(images, load=load, cached_side=side)


class Index(NamedTuple):
    """Heights and widths of the images in a cache, ``(N, 2)``, and the checksums of their pixels, ``(N,)``, uint64."""

    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint64]


def _read_index(path: Path, count: int) -> Index | None:
    """Read the index of a cache, and mark the cache as used; ``None`` if it is missing, damaged or incomplete."""
    # Numpy's files are zip archives: a damaged part doesn't match its checksum.
    with suppress(Exception), (path / INDEX_FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        index = Index(arrays["sizes"], arrays["checksums"])
        is_whole = index.sizes.shape == (count, 2) and index.checksums.shape == (count,) and index.sizes.min() > 0
        if is_whole and (path / _PIXELS).stat().st_size == 3 * index.sizes.prod(axis=1).sum():
            os.utime(path / INDEX_FILE)
            return index
    return None


class CachedPixels:
    """Reads images from a cache's file: all images one after the other, each as ``(H, W, 3)``, uint8.

    Reading is as fast as memory-mapping, whose pages would count as the memory of each process. An image that doesn't
    match its checksum is decoded from its file again and repaired in the cache; without the cache's file, all are.
    """

    def __init__(self, path: Path, index: Index, decode: Callable[[int], Tensor]) -> None:
        self.path = path
        self.sizes, self.checksums = index
        self.starts = np.concatenate([[0], np.cumsum(3 * self.sizes.prod(axis=1))])
        self._decode = decode

    def __call__(self, index: int) -> Tensor:
        """Read an image ``(3, H, W)``, uint8."""
        pixels, length = np.empty((*self.sizes[index], 3), dtype=np.uint8), 0
        with suppress(OSError), self.path.open("rb", buffering=0) as file:
            file.seek(self.starts[index])
            length = file.readinto(pixels.data)
        # What wasn't read is whatever was in memory.
        if length == pixels.nbytes and xxh3_64_intdigest(pixels.data) == self.checksums[index]:
            return torch.from_numpy(pixels).permute(2, 0, 1)
        decoded = self._decode(index)
        contents = decoded.permute(1, 2, 0).contiguous().numpy()
        if contents.shape == pixels.shape and xxh3_64_intdigest(contents.data) == self.checksums[index]:
            with suppress(OSError), self.path.open("r+b") as file:
                file.seek(self.starts[index])
                file.write(contents.data)
        return decoded


def verify_cache(path: Path) -> tuple[int, int]:
    """Compare the images in a cache with their checksums; return the numbers of images and of damaged ones."""
    with np.load(path / INDEX_FILE, allow_pickle=False) as arrays:
        sizes, checksums = arrays["sizes"], arrays["checksums"]
    damaged = 0
    with (path / _PIXELS).open("rb") as file:
        for size, checksum in zip(sizes, checksums, strict=True):
            damaged += xxh3_64_intdigest(file.read(3 * int(size.prod()))) != int(checksum)
    return len(sizes), damaged


def _write(images: LabeledImages, side: int, path: Path, progress: Callable[[int, int], object]) -> Index:
    # Left by a killed process; the caller holds the lock.
    shutil.rmtree(path, ignore_errors=True)
    sizes: list[tuple[int, int]] = []
    checksums: list[int] = []
    # Threads suffice, as Pillow decodes without holding the interpreter lock.
    with write_atomically(path / _PIXELS) as file, ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        for start in range(0, len(images), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(images)))
            for pixels in threads.map(partial(_load_resized, images, side), indices):
                contents = pixels.permute(1, 2, 0).contiguous().numpy().data
                file.write(contents)
                sizes.append((pixels.shape[1], pixels.shape[2]))
                checksums.append(xxh3_64_intdigest(contents))
            progress(len(sizes), len(images))
    index = Index(np.array(sizes, dtype=np.int64), np.array(checksums, dtype=np.uint64))
    # The index is written last: a cache without one is incomplete.
    with write_atomically(path / INDEX_FILE) as file:
        np.savez(file, **index._asdict())
    return index


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
