"""Sharded archives as webdataset has them: which there are, and the splits that they make."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch import Tensor

from kd.data.images import LabeledImages, Splits
from kd.data.samples import Member, Sample, Shard, import_webdataset, members, stream
from kd.data.shard_index import counted
from kd.errors import UserError

CLASSES_FILE = "classes.txt"
_SAMPLED_SHARDS, _SAMPLED_IMAGES = 8, 32


@dataclass(frozen=True)
class Shards:
    """The archives of one split, in their order.

    Args:
        entries: The archives.
        classes: Names of the classes.
        counts: Images of each class, where that is known.
    """

    entries: tuple[Shard, ...]
    classes: tuple[str, ...]
    counts: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Count the images."""
        return sum(one.images for one in self.entries)


@dataclass(frozen=True)
class ShardedSplits(Splits):
    """Training and validation images in archives; ``train`` holds no more than a sample of the training images.

    Args:
        train_shards: The archives to learn from.
        val_shards: The archives to measure on.
    """

    train_shards: Shards
    val_shards: Shards

    @property
    def train_size(self) -> int:
        """How many images there are to learn from."""
        return len(self.train_shards)

    @property
    def train_counts(self) -> Sequence[int] | None:
        """How many of them each class has."""
        return self.train_shards.counts


def read_shards(
    data_dir: str | Path, *, train_data: str = "train", val_data: str = "val", cache: Path
) -> ShardedSplits:
    """Find the archives of training and validation images; they are counted where no index tells of them.

    Args:
        data_dir: Folder that holds ``classes.txt`` and, as a rule, ``index.json`` and the folders of archives.
        train_data: Folder of archives within it, or a pattern such as ``train/{000000..000146}.tar`` or
            ``https://host/train/{000000..000146}.tar``.
        val_data: Likewise.
        cache: Folder where the counts of archives that no index tells of are kept.

    Raises:
        UserError: If something is missing, or not as it should be; the message names the file.
    """
    root, classes = _read_classes(data_dir)
    train = _shards_at(root, train_data, "--train_data", classes, cache=cache, labeled=False)
    val = _shards_at(root, val_data, "--val_data", classes, cache=cache, labeled=True)
    return ShardedSplits(
        name=root.resolve().name, train=_sample_of(train), val=_images_of(val), train_shards=train, val_shards=val
    )


def read_validation_shards(data_dir: str | Path, val_data: str = "val", *, cache: Path) -> LabeledImages:
    """Return the validation images alone, each read at its place; arguments and errors as of :func:`read_shards`."""
    root, classes = _read_classes(data_dir)
    return _images_of(_shards_at(root, val_data, "--val_data", classes, cache=cache, labeled=True))


class ShardReader:
    """Reads single images at their places in archives on the disk, for those who ask for a few.

    Args:
        shards: The archives.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._ends = list(accumulate(one.images for one in shards.entries))

    def __call__(self, index: int) -> Tensor:
        """Read an image ``(3, H, W)``, uint8."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards.entries[which]
        if not Path(shard.url).is_file():
            raise UserError(f"{shard.url}: single images are read from shards on this machine's disks alone")
        there = _members(shard.url, len(self.shards.classes))[index - self._ends[which] + shard.images]
        with Path(shard.url).open("rb") as file:
            file.seek(there.offset)
            return Sample(there.key, there.label, file.read(there.size), shard.url).decode()


@lru_cache(maxsize=4096)
def _members(path: str, classes: int) -> list[Member]:
    return members(Path(path), classes=classes)


def _read_classes(data_dir: str | Path) -> tuple[Path, tuple[str, ...]]:
    import_webdataset()
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir}: there is no such folder")
    path = root / CLASSES_FILE
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; it names the classes in the order of their labels, one a line")
    classes = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    if "" in classes:
        raise UserError(f"{path}: line {classes.index('') + 1} is empty; each line names a class")
    if len(classes) == 1:
        raise UserError(f"{path}: there is one class only, {classes[0]!r}; a classifier needs two")
    if len(set(classes)) < len(classes):
        raise UserError(f"{path}: the class {max(classes, key=classes.count)!r} stands there twice")
    return root, classes


def _shards_at(root: Path, pattern: str, flag: str, classes: tuple[str, ...], *, cache: Path, labeled: bool) -> Shards:
    urls = _expanded(root, pattern, flag)
    entries, counts = counted(root, urls, classes=len(classes), cache=cache, labeled=labeled)
    return Shards(entries, classes, counts)


def _expanded(root: Path, pattern: str, flag: str) -> dict[str, str]:
    """Return where each archive lies, by the name that it has in the index."""
    place = root / pattern
    if place.is_dir():
        found = sorted(place.glob("*.tar"))
        if not found:
            raise UserError(f"{place}: there are no shards (*.tar) in this folder, which {flag} names")
        return {f"{pattern.rstrip('/')}/{path.name}": str(path.absolute()) for path in found}
    try:
        expanded: list[str] = import_webdataset().shardlists.expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{flag} {pattern}: this pattern makes no list of shards: {error}") from None
    if "://" in pattern or pattern.startswith("pipe:"):
        return {_name_elsewhere(url): url for url in expanded}
    for one in expanded:
        if not (root / one).is_file():
            kind = "shard" if one.endswith(".tar") else "folder of shards"
            raise UserError(f"{root / one}: there is no such {kind} ({flag} names it)")
    return {one: str((root / one).absolute()) for one in expanded}


def _name_elsewhere(url: str) -> str:
    """Return folder and file of an archive that lies elsewhere, by which it goes in the index.

    Example:
        >>> _name_elsewhere("pipe:curl -s https://host/data/train/000001.tar")
        'train/000001.tar'
    """
    found: list[str] = re.findall(r"[^/\s]+/[^/\s]+\.tar", url)
    return found[-1] if found else url


def _sample_of(shards: Shards) -> LabeledImages:
    """Read the first images of some archives, as they are encoded; to measure their colors takes no more."""
    some = np.linspace(0, len(shards.entries) - 1, min(_SAMPLED_SHARDS, len(shards.entries))).round().astype(int)
    samples: list[Sample] = []
    for which in some.tolist():
        shard = shards.entries[which]
        samples += stream(shard, 0, min(_SAMPLED_IMAGES, shard.images), classes=len(shards.classes))
    return LabeledImages(
        classes=shards.classes,
        labels=[sample.label for sample in samples],
        keys=[sample.key for sample in samples],
        load=partial(_decoded_at, samples),
    )


def _decoded_at(samples: Sequence[Sample], index: int) -> Tensor:
    return samples[index].decode()


def _images_of(shards: Shards) -> LabeledImages:
    return LabeledImages(
        classes=shards.classes,
        labels=[label for one in shards.entries for label in one.labels],
        keys=[key for one in shards.entries for key in one.keys],
        load=ShardReader(shards),
    )
