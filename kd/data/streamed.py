"""The data module of images that are streamed from sharded archives."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.data.batches import Batches, split_evenly
from kd.data.images import hide_labels
from kd.data.samples import Sample, import_webdataset
from kd.data.shards import ShardedSplits, Shards, images_of
from kd.data.views import EpochSampler, View, Views
from kd.randomness import derive_seed

SUBSTREAMS = 8
"""Substreams of a process, however many workers read them: the order is the same for any number of workers."""

_BUFFER = 2048
"""Encoded images in a process's shuffle buffers, over all of its substreams."""


@dataclass(frozen=True)
class Substreams:
    """A process's part of an epoch: a contiguous range of all images, divided into substreams.

    Each substream reads a contiguous range of its own, and batch ``i`` comes from substream ``i % SUBSTREAMS``.

    Args:
        start: Index of the first image of the part.
        count: Number of images.
        batch_size: Number of images in a batch.
        drop_last: Whether an incomplete last batch is dropped.
    """

    start: int
    count: int
    batch_size: int
    drop_last: bool = False

    @property
    def batches(self) -> int:
        """Number of batches."""
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def size(self, batch: int) -> int:
        """Return the number of images in a batch."""
        return min(self.batch_size, self.count - batch * self.batch_size)

    def piece(self, substream: int) -> tuple[int, int]:
        """Return the range of images of a substream, ``(begin, end)``."""
        begin = self.start + sum(map(self._length, range(substream)))
        return begin, begin + self._length(substream)

    def before(self, batch: int) -> int:
        """Return the number of images that a batch's substream yields before it."""
        return batch // SUBSTREAMS * self.batch_size

    def line(self) -> Iterator[int]:
        """Iterate over the indices of the images, batch by batch, as they are read without shuffling."""
        begins = [self.piece(substream)[0] for substream in range(SUBSTREAMS)]
        for batch in range(self.batches):
            first = begins[batch % SUBSTREAMS] + self.before(batch)
            yield from range(first, first + self.size(batch))

    def _length(self, substream: int) -> int:
        batches = range(substream, self.batches, SUBSTREAMS)
        return (len(batches) - 1) * self.batch_size + self.size(batches[-1]) if batches else 0


def usable_workers(workers: int) -> int:
    """Return the largest number of workers, at most ``workers``, among which the substreams divide evenly.

    Example:
        >>> [usable_workers(workers) for workers in (0, 1, 3, 7, 16)]
        [0, 1, 2, 4, 8]
    """
    return max((count for count in range(1, min(workers, SUBSTREAMS) + 1) if SUBSTREAMS % count == 0), default=0)


@dataclass(eq=False)
class StreamedBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of views with their labels, indexed by ``(epoch, batch)``.

    A batch is a function of its index and of the substreams only. Reading the batches of a substream one after the
    other is fast, as archives are read sequentially.

    Args:
        shards: The archives.
        substreams: The part of them to read.
        view: Turns an image into a square view.
        order_seed: Seed of the order, with the epoch; ``None`` keeps the order of the archives.
        view_seed: Seed of the views, with the epoch and the image's key; ``None`` for a deterministic view.
        reads_labels: Whether the labels are used.
        left_out: As of :class:`kd.data.views.Views`.
    """

    shards: Shards
    substreams: Substreams
    _: KW_ONLY
    view: View
    order_seed: int | None = None
    view_seed: int | None = None
    reads_labels: bool = True
    left_out: Callable[[str], object] | None = None
    _readers: dict[int, "_Reader"] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        """Count the batches."""
        return self.substreams.batches

    def __getitem__(self, which: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return a batch: views ``(B, 3, S, S)``, uint8, and labels ``(B,)``."""
        epoch, batch = which
        samples = self.samples(epoch, batch)
        images = images_of(samples, self.shards.classes)
        if not self.reads_labels:
            images = hide_labels(images, range(len(images)))
        views = Views(images, self.view, seed=self.view_seed, left_out=self.left_out)
        return views.__getitems__([(epoch, index) for index in range(len(samples))])

    def samples(self, epoch: int, batch: int) -> list[Sample]:
        """Return the encoded samples of a batch."""
        number, before = batch % SUBSTREAMS, self.substreams.before(batch)
        reader = self._readers.pop(number, None)
        if reader is None or (reader.epoch, reader.samples_read) != (epoch, before):
            # Another epoch, or a resumed one: earlier samples are skipped without decoding.
            reader = _Reader(epoch, before, islice(self._read(epoch, number), before, None))
        size = self.substreams.size(batch)
        samples = list(islice(reader.samples, size))
        if batch + SUBSTREAMS < self.substreams.batches:
            self._readers[number] = reader._replace(samples_read=before + size)
        return samples

    def _read(self, epoch: int, number: int) -> Iterator[Sample]:
        """Read a substream of an epoch from its start."""
        begin, end = self.substreams.piece(number)
        samples = self._read_range(epoch, begin, end)
        if self.order_seed is None:
            return samples
        # webdataset's shuffle: the next sample is drawn from a buffer, which is then refilled.
        size = _BUFFER // SUBSTREAMS
        generator = random.Random(derive_seed(self.order_seed, "buffer", epoch, begin))  # noqa: S311 (no secret)
        shuffled: Iterator[Sample] = iter(import_webdataset().shuffle(size, initial=size, rng=generator)(samples))
        return shuffled

    def _read_range(self, epoch: int, begin: int, end: int) -> Iterator[Sample]:
        """Read a range of the concatenated archives, whose order changes with the epoch."""
        if self.order_seed is None:
            return self.shards.read(begin, end)
        generator = torch.Generator().manual_seed(derive_seed(self.order_seed, "shards", epoch))
        order = torch.randperm(len(self.shards.entries), generator=generator).tolist()
        return replace(self.shards, entries=tuple(self.shards.entries[index] for index in order)).read(begin, end)


class _Reader(NamedTuple):
    """An open substream: its epoch, the number of samples read, and the samples to come."""

    epoch: int
    samples_read: int
    samples: Iterator[Sample]


class ShardData(Batches):
    """Batches of images that are streamed from sharded archives.

    Each substream of each process reads a contiguous range of the concatenated archives, so that every image is read
    once an epoch, whatever the number of archives, processes and workers; a range that begins within an archive skips
    what is before it. Order and views depend on (seed, epoch) and the number of processes, not on the workers.

    Args:
        splits: The archives.
        num_workers: Processes that load images, of which 1, 2, 4 or 8 are used; 0 loads them in the training process.
        options: Further arguments of :class:`kd.data.Batches`.
    """

    def __init__(self, splits: ShardedSplits, *, num_workers: int = 0, **options: Any) -> None:
        super().__init__(splits, num_workers=usable_workers(num_workers), **options)
        self.val_shards = splits.val_shards
        self._train_batches = partial(
            StreamedBatches,
            splits.train_shards,
            view=self.train_view,
            order_seed=self.seed,
            view_seed=self.view_seed,
            reads_labels=self.reads_labels,
            left_out=self.left_out,
        )

    @property
    def train_count(self) -> int:
        """Number of training images of an epoch, over all processes."""
        return self.splits.train_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the training batches of this process, in an order that depends on (seed, epoch)."""
        batches = self._train_batches(self._train_substreams(*self._rank_and_world_size()))
        sampler = EpochSampler(range(len(batches)), seed=None, period=self.period)
        sampler.set_epoch(self._next_epoch())
        return self._loader(batches, skip=sampler.skip, sampler=sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return this process's part of the validation images, in the order of the archives."""
        substreams = self._val_substreams(*self._rank_and_world_size())
        batches = StreamedBatches(self.val_shards, substreams, view=self.val_view)
        return self._loader(batches, sampler=EpochSampler(range(len(batches)), seed=None), batch_size=None)

    def validation_indices(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the indices of the validation images of a process, in the order of its batches."""
        return list(self._val_substreams(rank, world_size).line())

    def first_views(self, count: int) -> list[tuple[Tensor, int]]:
        """Return the first views of the first epoch, ``(3, S, S)``, uint8, with their labels."""
        views, labels = self._train_batches(self._train_substreams(*self._rank_and_world_size()))[0, 0]
        return list(zip(views[:count], labels[:count].tolist(), strict=True))

    def _train_substreams(self, rank: int, world_size: int) -> Substreams:
        counts, drop_last = self._images_per_process(world_size)
        if self.batch_size > 1:
            return Substreams(sum(counts[:rank]), counts[rank], self.batch_size, drop_last)
        # A batch of one image can't weigh less: where images don't divide evenly, the first ones are given twice.
        even = math.ceil(self.train_count / world_size)
        return Substreams(rank * even, even, 1)

    def _val_substreams(self, rank: int, world_size: int) -> Substreams:
        counts = split_evenly(len(self.val_shards), world_size)
        return Substreams(sum(counts[:rank]), counts[rank], self.batch_size)
