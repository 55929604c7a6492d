"""Labeled images as a value: classes, labels and keys in memory, pixels read on demand."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.files import content_digest
from kd.randomness import derive_seed

T = TypeVar("T")

UNLABELED = -1
Label = int | tuple[int, ...]
"""The class of an image, or with several labels an image, its classes in ascending order."""

UNEVEN = 1.5
"""Number of images of the most frequent class, in units of the mean, from which classes count as uneven."""
_MAX_SHOWN = 5


@dataclass(frozen=True)
class LabeledImages:
    """Images of some classes, read one at a time.

    Args:
        classes: Names of the classes; a label is an index into them.
        labels: Label of each image, ``(N,)``, or `UNLABELED`; of ``multilabel`` images, all of its labels.
        keys: Path of each image within its data set, on which its random views depend.
        load: Reads the image at an index: ``(3, H, W)``, uint8, of any size.
        files: The file of each image, or empty if the images don't come from files.
        digests: Hash of the content of each image, ``(N, 16)``, uint8; ``None`` if it wasn't computed.
        cached_side: The short side, in pixels, to which larger images were resized in a decode cache, or ``None``.
        pixel_range: The gray values that become black and white in deeper images, see :func:`kd.pixels.decode`.
        multilabel: Whether an image may have several labels, or none.
    """

    classes: tuple[str, ...]
    labels: Sequence[Label]
    keys: Sequence[str]
    load: Callable[[int], Tensor]
    files: Sequence[Path] = ()
    digests: NDArray[np.uint8] | None = field(default=None, compare=False)
    cached_side: int | None = None
    pixel_range: tuple[float, ...] = ()
    multilabel: bool = False

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """A hash of the keys and the contents of all images, in order; ``None`` if these are unknown."""
        digests = self.digests
        if digests is None and self.files:
            digests = np.frombuffer(b"".join(content_digest(path.read_bytes()) for path in self.files), dtype=np.uint8)
        if digests is None:
            return None
        digest = hashlib.blake2b("\0".join(self.keys).encode(errors="surrogateescape"), digest_size=16)
        digest.update(np.ascontiguousarray(digests).data)
        return digest.hexdigest()

    def describe(self) -> str:
        """Return in words the number of images and of classes, and a hash of contents, labels, names and order."""
        digest = hashlib.blake2b(
            "\0".join((*self.classes, "", *self.keys)).encode(errors="surrogateescape"), digest_size=8
        )
        digest.update(f"{list(self.labels)} {self.fingerprint}".encode())
        kind = "names" if self.fingerprint is None else "content"
        return f"{len(self):,} images in {len(self.classes):,} classes, {kind} {digest.hexdigest()}"

    def with_digests(self, digests: NDArray[np.uint8]) -> "LabeledImages":
        """Return the same images with the hashes of their contents."""
        return replace(self, digests=digests)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def targets(self, indices: Sequence[int]) -> Tensor:
        """Return the labels of some images as the losses take them.

        Returns:
            ``(B,)``, int64; with several labels an image ``(B, C)``, float32, 1 for each of its classes and else 0, or
            -1 where the labels are unknown.
        """
        labels = [self.labels[index] for index in indices]
        if not self.multilabel:
            return torch.tensor(labels, dtype=torch.int64)
        targets = torch.zeros(len(labels), len(self.classes))
        for row, label in zip(targets, labels, strict=True):
            row[list(label) if isinstance(label, tuple) else slice(None)] = 1 if isinstance(label, tuple) else UNLABELED
        return targets

    def class_counts(self) -> list[int]:
        """Return the number of images of each class."""
        counts = Counter(each for label in self.labels for each in (label if isinstance(label, tuple) else (label,)))
        return [counts[label] for label in range(len(self.classes))]

    @functools.cached_property
    def strata(self) -> list[int]:
        """The class by which each image is drawn: its label, or of several the rarest; -1 without any."""
        counts = self.class_counts()
        return [
            min(label, key=lambda each: (counts[each], each), default=UNLABELED) if isinstance(label, tuple) else label
            for label in self.labels
        ]

    def name_of(self, index: int) -> str:
        """Return the file of an image, or its key, for messages."""
        return str(self.files[index]) if self.files else self.keys[index]

    def subset(self, indices: Sequence[int]) -> "LabeledImages":
        """Return the images at the given indices."""
        labels, keys = [self.labels[index] for index in indices], [self.keys[index] for index in indices]
        files = [self.files[index] for index in indices] if self.files else ()
        digests = None if self.digests is None else self.digests[list(indices)]
        load = partial(apply_at, self.load, indices)
        return replace(self, labels=labels, keys=keys, load=load, files=files, digests=digests)


def hide_labels(images: LabeledImages, indices: Collection[int]) -> LabeledImages:
    """Return the same images with the labels at the given indices replaced by `UNLABELED`."""
    labels: list[Label] = [UNLABELED if index in indices else label for index, label in enumerate(images.labels)]
    return replace(images, labels=labels)


def concatenate(first: LabeledImages, second: LabeledImages) -> LabeledImages:
    """Return the images of both, with the classes of the first; these of the second have no label."""
    digests = [images.digests for images in (first, second) if images.digests is not None]
    return LabeledImages(
        classes=first.classes,
        labels=[*first.labels, *second.labels],
        keys=[*first.keys, *second.keys],
        load=partial(_load_from_either, first, second),
        files=[*first.files, *second.files],
        cached_side=first.cached_side if second.cached_side is not None or not second.files else None,
        digests=np.concatenate(digests) if len(digests) == len((first, second)) else None,
        multilabel=first.multilabel,
    )


# Functions rather than lambdas, so that the images can be sent to loader processes.
def apply_at(load: Callable[[T], Tensor], items: Sequence[T], index: int) -> Tensor:
    """Load the item at an index."""
    return load(items[index])


def _load_from_either(first: LabeledImages, second: LabeledImages, index: int) -> Tensor:
    return first.load(index) if index < len(first) else second.load(index - len(first))


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images of the same classes; ``name`` is the data set's in folders and tables."""

    name: str
    train: LabeledImages
    val: LabeledImages
    test: LabeledImages | None = field(default=None, kw_only=True)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.train.classes

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.train)

    def describe(self) -> dict[str, str]:
        """Return the number and the content hash of the images of each split, in words."""
        return {"training images": self.train.describe(), "validation images": self.val.describe()}

    @property
    def train_counts(self) -> Sequence[int] | None:
        """Number of training images of each class; ``None`` if unknown."""
        return self.train.class_counts()

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.train.multilabel


def match_classes(images: LabeledImages, classes: Sequence[str], *, network: str) -> LabeledImages:
    """Return the same images with a network's labels, matched by class name; ``network`` is its name in messages.

    The classes of the images may be a subset of the network's, in any order.
    """
    positions = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in images.classes if name not in positions]
    if unknown:
        shown = ", ".join(unknown[:_MAX_SHOWN]) + (", ..." if len(unknown) > _MAX_SHOWN else "")
        raise UserError(f"{network} was trained on other classes: only the images have {shown}")

    def position(label: int) -> int:
        return label if label == UNLABELED else positions[images.classes[label]]

    labels: list[Label] = [
        tuple(sorted(map(position, label))) if isinstance(label, tuple) else position(label) for label in images.labels
    ]
    return replace(images, classes=tuple(classes), labels=labels)


def keep_fraction(images: LabeledImages, fraction: float, *, seed: int) -> list[int]:
    """Draw a stratified random subset, and return its indices, ascending.

    At least one image of each class is kept. With the same seed, a smaller fraction is a subset of a larger one.
    """
    labels, kept = torch.as_tensor(images.strata), list[int]()
    # Images with several labels may also have none.
    names = [(UNLABELED, "")] if images.multilabel else []
    for label, name in [*names, *enumerate(images.classes)]:
        members = torch.nonzero(labels == label).flatten()
        generator = torch.Generator().manual_seed(derive_seed(seed, "fraction", name))
        order = members[torch.randperm(len(members), generator=generator)]
        kept += order[: max(len(members) > 0, round(fraction * len(members)))].tolist()
    return sorted(kept)


def is_uneven(labels: Sequence[Label]) -> bool:
    """Return whether the most frequent class has clearly more images than the mean of those that have any."""
    counts = Counter(labels).values()
    return len(counts) > 1 and max(counts) >= UNEVEN * sum(counts) / len(counts)


def evenly_spaced(count: int, sample: int) -> list[int]:
    """Return at most ``sample`` evenly spaced indices of ``count`` items."""
    indices: list[int] = torch.linspace(0, count - 1, min(sample, count)).round().long().tolist()
    return indices


def channel_statistics(
    images: LabeledImages, view: Callable[[Tensor], Tensor], *, sample: int = 256
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the means and the standard deviations of the color channels, for pixels in [0, 1], to four digits.

    They are those of the views, which have one size, of ``sample`` evenly spaced images.
    """
    pixels = torch.stack([view(images.load(index)) for index in evenly_spaced(len(images), sample)]).float() / 255
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    # Normalizing a constant channel would divide by zero.
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(max(s, 1e-2), 4) for s in std.tolist())
