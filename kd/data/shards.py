"""Data sets of sharded archives in webdataset's format: finding the shards, and the splits that they form."""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from kd.data.images import LabeledImages, Splits, apply_at, evenly_spaced
from kd.data.samples import Sample, Shard, import_webdataset, read_samples
from kd.data.shard_index import count_images, digest_of_file
from kd.errors import UserError

CLASSES_FILE = "classes.txt"
_SAMPLED_SHARDS, _SAMPLED_IMAGES = 8, 32


@dataclass(frozen=True)
class Shards:
    """The shards of one split, in order, with the number of images of each class if known."""

    entries: tuple[Shard, ...]
    classes: tuple[str, ...]
    counts: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(shard.images for shard in self.entries)

    def read(self, begin: int, end: int) -> Iterator[Sample]:
        """Read a range of the images of all shards; past the last shard it continues with the first."""
        for shard, first, last in self._ranges(begin, end):
            yield from read_samples(shard, first, last, classes=len(self.classes))

    def load(self, index: int) -> Tensor:
        """Decode the image at an index, whose shard must be on disk."""
        ((shard, first, last),) = self._ranges(index, index + 1)
        if not Path(shard.url).is_file():
            raise UserError(f"{shard.url}: single images can't be read from remote shards; copy it to a local disk")
        (sample,) = read_samples(shard, first, last, classes=len(self.classes))
        return sample.decode()

    def describe(self) -> str:
        """Return in words the number of images and of classes, and a hash of the contents that the index records."""
        digest = hashlib.blake2b(" ".join(self.classes).encode(), digest_size=8)
        for shard in self.entries:
            digest.update(f"{shard.name} {shard.images} {shard.digest}\n".encode())
        kind = "content" if all(shard.digest for shard in self.entries) else "index"
        return f"{len(self):,} images in {len(self.classes):,} classes, {kind} {digest.hexdigest()}"

    def verify(self, *, full: bool = False) -> None:
        """Compare the content of a randomly chosen shard on disk, or of all with ``full``, with the index.

        Raises:
            UserError: If a shard was changed or damaged.
        """
        recorded = [shard for shard in self.entries if shard.digest and Path(shard.url).is_file()]
        for shard in recorded if full else random.SystemRandom().sample(recorded, min(1, len(recorded))):
            if digest_of_file(Path(shard.url)) != shard.digest:
                problem = "this shard's content isn't the one that its index records"
                raise UserError(f"{shard.url}: {problem}; restore it, or write shards and index again with kd shard")

    def _ranges(self, begin: int, end: int) -> Iterator[tuple[Shard, int, int]]:
        passed = 0
        while begin < end:
            for shard in self.entries:
                first, last = max(0, begin - passed), min(shard.images, end - passed)
                if first < last:
                    yield shard, first, last
                    begin = passed + last
                passed += shard.images


@dataclass(frozen=True)
class ShardedSplits(Splits):
    """Training and validation images in shards; ``train`` contains only a sample of the training images."""

    train_shards: Shards
    val_shards: Shards

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.train_shards)

    def describe(self) -> dict[str, str]:
        """Return the number and the content hash of the images of each split, in words."""
        return {"training images": self.train_shards.describe(), "validation images": self.val_shards.describe()}

    @property
    def train_counts(self) -> Sequence[int] | None:
        """Number of training images of each class; ``None`` if unknown."""
        return self.train_shards.counts


def read_shards(
    data_dir: str | Path, *, train_data: str = "train", val_data: str = "val", test_data: str | None = None, cache: Path
) -> ShardedSplits:
    """Find the training, validation and test shards of a folder with ``classes.txt`` and usually ``index.json``.

    ``train_data``, ``val_data`` and ``test_data`` are folders within it, or patterns such as
    ``train/{000000..000146}.tar`` or ``https://host/train/{000000..000146}.tar``. Shards missing from the index are
    counted; ``cache`` keeps the counts.
    """
    root, classes = _read_classes(data_dir)
    train = _find(root, train_data, "--train_data", classes, cache)
    val = _find(root, val_data, "--val_data", classes, cache)
    test = None if test_data is None else _images(_find(root, test_data, "--test_data", classes, cache))
    return ShardedSplits(root.resolve().name, _sample_images(train), _images(val), train, val, test=test)


def read_validation_shards(data_dir: str | Path, val_data: str = "val", *, cache: Path) -> LabeledImages:
    """Return only the validation images, with random access; arguments as of `read_shards`."""
    root, classes = _read_classes(data_dir)
    return _images(_find(root, val_data, "--val_data", classes, cache))


def _read_classes(data_dir: str | Path) -> tuple[Path, tuple[str, ...]]:
    import_webdataset()
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir}: there is no such folder")
    path = root / CLASSES_FILE
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; list the class names in it, one per line, in label order")
    classes = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    if "" in classes:
        raise UserError(f"{path}: line {classes.index('') + 1} is empty; write one class name per line")
    if len(classes) == 1:
        raise UserError(f"{path}: there is only one class, {classes[0]!r}; a classifier needs two")
    if len(set(classes)) < len(classes):
        raise UserError(f"{path}: class {max(classes, key=classes.count)!r} occurs twice")
    return root, classes


def _find(root: Path, pattern: str, flag: str, classes: tuple[str, ...], cache: Path) -> Shards:
    urls, labeled = _expand(root, pattern, flag), flag != "--train_data"
    entries, counts = count_images(root, urls, classes=len(classes), cache=cache, labeled=labeled)
    return Shards(entries, classes, counts)


def _expand(root: Path, pattern: str, flag: str) -> dict[str, str]:
    """Return the path or URL of each shard, by its name in the index."""
    folder = root / pattern
    if folder.is_dir():
        found = sorted(folder.glob("*.tar"))
        if not found:
            raise UserError(f"{folder}: there are no shards (*.tar) in this folder, set by {flag}")
        return {f"{pattern.rstrip('/')}/{path.name}": str(path.absolute()) for path in found}
    try:
        expanded: list[str] = import_webdataset().shardlists.expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{flag} {pattern}: this pattern is invalid: {error}") from None
    if "://" in pattern or pattern.startswith("pipe:"):
        # By folder and file name, as in "pipe:curl -s https://host/data/train/000001.tar".
        return {(re.findall(r"[^/\s]+/[^/\s]+\.tar", url) or [url])[-1]: url for url in expanded}
    for name in expanded:
        if not (root / name).is_file():
            kind = "shard" if name.endswith(".tar") else "folder of shards"
            raise UserError(f"{root / name}: there is no such {kind} (set by {flag})")
    return {name: str((root / name).absolute()) for name in expanded}


def _sample_images(shards: Shards) -> LabeledImages:
    """Read the first images of some shards, enough to compute the channel statistics."""
    samples: list[Sample] = []
    for number in evenly_spaced(len(shards.entries), _SAMPLED_SHARDS):
        shard = shards.entries[number]
        samples += read_samples(shard, 0, min(_SAMPLED_IMAGES, shard.images), classes=len(shards.classes))
    return images_of(samples, shards.classes)


def images_of(samples: Sequence[Sample], classes: tuple[str, ...]) -> LabeledImages:
    """Return encoded samples as images."""
    labels, keys = [sample.label for sample in samples], [sample.key for sample in samples]
    return LabeledImages(classes, labels, keys, partial(apply_at, Sample.decode, samples))


def _images(shards: Shards) -> LabeledImages:
    labels = [label for shard in shards.entries for label in shard.labels]
    keys = [key for shard in shards.entries for key in shard.keys]
    return LabeledImages(shards.classes, labels, keys, shards.load)
