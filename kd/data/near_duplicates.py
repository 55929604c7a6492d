"""Images of different splits that look alike, found by perceptual hashes."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.data.images import LabeledImages
from kd.pixels import open_image

_SIDE = 64
_DISTANCE = 4
"""Bits of 64 in which the hashes of two versions of a photograph may differ."""
_CHUNK = 256
# An image of one tone has a hash without information.
_LEAST_DEVIATION = 4.0


def find_near_duplicates(
    first: LabeledImages, second: LabeledImages, *, progress: Callable[[int, int], object] = lambda *_: None
) -> list[tuple[str, str]] | None:
    """Return pairs of an image file of each that look alike, such as two sizes of a photograph.

    The hashes are those of the low frequencies of each image, 64 bits, of which at most 4 may differ. Files with equal
    contents, and images of a single tone, are left out.

    Args:
        first: The images to search.
        second: The images to find in them.
        progress: Called with the number of files read and their total.

    Returns:
        Pairs of names; ``None`` if the package imagehash isn't installed.

    Source: Zauner (2010), section 3.2.1, https://www.phash.org/docs/pubs/thesis_zauner.pdf
    """
    try:
        import imagehash
    except ImportError:
        return None
    total, done = len(first.files) + len(second.files), 0

    def compute(files: Sequence[Path]) -> NDArray[np.uint8]:
        nonlocal done
        rows = []
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            for bits in threads.map(lambda path: _hash(path, imagehash), files):
                rows.append(bits)
                done += 1
                progress(done, total)
        return np.array(rows, dtype=np.uint8).reshape(-1, 8)

    hashes, others = compute(first.files), compute(second.files)
    found = []
    for start in range(0, len(others), _CHUNK):
        chunk = others[start : start + _CHUNK]
        distances = np.bitwise_count(hashes.view(np.uint64) ^ chunk.view(np.uint64).T)
        nearest = distances.argmin(axis=0)
        for index in np.flatnonzero((distances.min(axis=0) <= _DISTANCE) & chunk.any(axis=1)).tolist():
            one, other = int(nearest[index]), start + index
            is_same = first.digests is not None and second.digests is not None
            if not (is_same and np.array_equal(first.digests[one], second.digests[other])):  # type: ignore[index]
                found.append((first.name_of(one), second.name_of(other)))
    return found


def _hash(path: Path, imagehash: Any) -> NDArray[np.uint8]:  # noqa: ANN401 (a module without types)
    """Return a perceptual hash of 8 bytes; zeros for an image of a single tone, or one that can't be read."""
    try:
        with open_image(path) as image:
            # JPEG files are decoded at a smaller size.
            image.draft("L", (_SIDE, _SIDE))
            gray = image.convert("L")
    except (OSError, ValueError, SyntaxError):
        return np.zeros(8, dtype=np.uint8)
    if np.asarray(gray).std() < _LEAST_DEVIATION:
        return np.zeros(8, dtype=np.uint8)
    return np.packbits(imagehash.phash(gray).hash)
