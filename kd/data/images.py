"""Labeled images: where they come from is behind them, their classes, labels and pixels are at hand."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kd.errors import UserError
from kd.randomness import derive_seed

_SHOWN = 5

UNLABELED = -1
"""The label of an image without one."""


@dataclass(frozen=True)
class LabeledImages:
    """Images with their classes, read one at a time.

    Args:
        classes: Names of the classes; a label is an index into them.
        labels: Label of each image, ``(N,)``; :data:`UNLABELED` where it has none.
        keys: What identifies each image wherever the data lie (its path within its folder); its views hang on it.
        load: Reads the image at an index: ``(3, H, W)``, uint8, of any size.
        files: The file of each image, where each has one.
        fingerprint: What changes when any of the images does; ``None``: that can't be told.
        cached_side: The longest short side of what was made smaller when it was decoded into a store, or ``None``.
    """

    classes: tuple[str, ...]
    labels: Sequence[int]
    keys: Sequence[str]
    load: Callable[[int], Tensor]
    files: Sequence[Path] = ()
    fingerprint: str | None = None
    cached_side: int | None = None

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def subset(self, indices: Sequence[int]) -> "LabeledImages":
        """Return some of the images."""
        files = [self.files[index] for index in indices] if self.files else ()
        keys = [self.keys[index] for index in indices]
        return replace(
            self,
            labels=[self.labels[index] for index in indices],
            keys=keys,
            load=partial(_load_chosen, self.load, indices),
            files=files,
            fingerprint=fingerprint_of_files(files, keys) if files else None,
        )


def hide_labels(images: LabeledImages, indices: Sequence[int]) -> LabeledImages:
    """Return the same images, those at some indices without their labels."""
    labels = list(images.labels)
    for index in indices:
        labels[index] = UNLABELED
    return replace(images, labels=labels)


def concatenate(first: LabeledImages, second: LabeledImages) -> LabeledImages:
    """Return the images of both, with the classes of the first; the indices of the second follow on."""
    return LabeledImages(
        classes=first.classes,
        labels=[*first.labels, *second.labels],
        keys=[*first.keys, *second.keys],
        load=partial(_load_either, first, second),
        files=[*first.files, *second.files],
        cached_side=first.cached_side if second.cached_side is not None or not second.files else None,
        fingerprint=None
        if None in (first.fingerprint, second.fingerprint)
        else f"{first.fingerprint} {second.fingerprint}",
    )


def _load_chosen(load: Callable[[int], Tensor], indices: Sequence[int], index: int) -> Tensor:
    return load(indices[index])


def _load_either(first: LabeledImages, second: LabeledImages, index: int) -> Tensor:
    return first.load(index) if index < len(first) else second.load(index - len(first))


def fingerprint_of_files(files: Sequence[Path], keys: Sequence[str]) -> str:
    """Return what changes when a file among these changes: a digest of their keys, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=16)
    for file, key in zip(files, keys, strict=True):
        facts = file.stat()
        digest.update(f"{key}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Splits:
    """Training and validation images of the same classes.

    Args:
        name: Short name of the data, for folders and tables.
        train: Images to learn from.
        val: Images to measure on.
    """

    name: str
    train: LabeledImages
    val: LabeledImages

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.train.classes

    @property
    def train_size(self) -> int:
        """How many images there are to learn from."""
        return len(self.train)

    @property
    def train_counts(self) -> Sequence[int] | None:
        """How many of them each class has; ``None`` where that is not known."""
        counts = Counter(self.train.labels)
        return [counts[label] for label in range(len(self.classes))]


def match_classes(images: LabeledImages, classes: Sequence[str], *, network: str) -> LabeledImages:
    """Return the same images with the labels that a network has for their classes, which are matched by name.

    Args:
        images: The images; their classes may be in another order, or some of the network's.
        classes: The network's.
        network: What network that is, for the message.

    Raises:
        UserError: If the images have a class that the network has not.
    """
    places = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in images.classes if name not in places]
    if unknown:
        some = ", ".join(unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        raise UserError(f"{network} was trained for other classes: only the images have {some}")
    names = [places[name] for name in images.classes]
    labels = [UNLABELED if label == UNLABELED else names[label] for label in images.labels]
    return replace(images, classes=tuple(classes), labels=labels)


def keep_fraction(images: LabeledImages, fraction: float, *, seed: int) -> list[int]:
    """Choose a part of each class.

    A smaller fraction of the same seed is a part of the larger one.

    Args:
        images: The images to choose from.
        fraction: Part of each class to keep, above 0, at most 1; at least one image of each class stays.
        seed: What the choice hangs on.

    Returns:
        Indices of the images kept, ascending.
    """
    labels = torch.as_tensor(images.labels)
    kept: list[int] = []
    for label, name in enumerate(images.classes):
        members = torch.nonzero(labels == label).flatten()
        generator = torch.Generator().manual_seed(derive_seed(seed, "fraction", name))
        order = members[torch.randperm(len(members), generator=generator)]
        kept += order[: max(1, round(fraction * len(members)))].tolist()
    return sorted(kept)


def channel_statistics(
    images: LabeledImages, view: Callable[[Tensor], Tensor], *, sample: int = 256
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure the mean and the standard deviation of each color channel, with pixels in [0, 1].

    Args:
        images: The images, of which an evenly spaced sample is read.
        view: What makes a square of each, as the network will see it.
        sample: How many images to read at most.

    Returns:
        Mean and standard deviation of red, green and blue, rounded to four digits.
    """
    indices = torch.linspace(0, len(images) - 1, min(sample, len(images))).round().long().tolist()
    pixels = torch.stack([view(images.load(index)) for index in indices]).float() / 255
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    # A channel that never changes must not be divided by zero.
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(max(s, 1e-2), 4) for s in std.tolist())
