"""The data module of images that are streamed from sharded archives."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

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


def batch_ranges(start: int, count: int, batch_size: int, *, drop_last: bool = False) -> list[range]:
    """Return the range of images of each batch of a process, as they are read without shuffling.

    The process's images, ``count`` from index ``start`` on, are divided into substreams, each a contiguous range. Batch
    ``i`` is read from substream ``i % SUBSTREAMS``.
    """
    sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
    if drop_last and sizes and sizes[-1] < batch_size:
        sizes.pop()
    ranges = [range(0)] * len(sizes)
    for substream in range(SUBSTREAMS):
        for batch in range(substream, len(sizes), SUBSTREAMS):
            ranges[batch] = range(start, start + sizes[batch])
            start += sizes[batch]
    return ranges


def usable_workers(workers: int) -> int:
    """Return the largest number of workers, at most ``workers``, among which the substreams divide evenly.

    Example:
        >>> [usable_workers(workers) for workers in (0, 1, 3, 7, 16)]
        [0, 1, 2, 4, 8]
    """
    return max((count for count in range(1, min(workers, SUBSTREAMS) + 1) if SUBSTREAMS % count == 0), default=0)


@dataclass(eq=False)
class StreamedBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of views with their labels, indexed by ``(epoch, batch)``; fast if a substream is read in order.

    ``ranges`` are from `batch_ranges`. Images are shuffled by ``order_seed`` and the epoch; ``None`` keeps the order of
    the archives. ``view``, ``view_seed`` and ``left_out`` are as of :class:`kd.data.views.Views`.
    """

    shards: Shards
    ranges: Sequence[range]
    _: KW_ONLY
    view: View
    order_seed: int | None = None
    view_seed: int | None = None
    reads_labels: bool = True
    left_out: Callable[[str], object] | None = None
    # By substream: the epoch, the number of samples read, and the remaining samples.
    _readers: dict[int, tuple[int, int, Iterator[Sample]]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.ranges)

    def __getitem__(self, position: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return a batch: views ``(B, 3, S, S)``, uint8, and labels ``(B,)``."""
        epoch, batch = position
        images = images_of(self.samples(epoch, batch), self.shards.classes)
        if not self.reads_labels:
            images = hide_labels(images, range(len(images)))
        views = Views(images, self.view, seed=self.view_seed, left_out=self.left_out)
        return views.__getitems__([(epoch, index) for index in range(len(images))])

    def samples(self, epoch: int, batch: int) -> list[Sample]:
        """Return the encoded samples of a batch."""
        substream, size = batch % SUBSTREAMS, len(self.ranges[batch])
        passed = self.ranges[batch].start - self.ranges[substream].start
        last_epoch, samples_read, samples = self._readers.pop(substream, (None, 0, iter(())))
        if (last_epoch, samples_read) != (epoch, passed):
            # Another epoch, or a resumed one: earlier samples are skipped without decoding.
            samples = islice(self._read(epoch, substream), passed, None)
        read = list(islice(samples, size))
        if batch + SUBSTREAMS < len(self.ranges):
            self._readers[substream] = (epoch, passed + size, samples)
        return read

    def _read(self, epoch: int, substream: int) -> Iterator[Sample]:
        """Read a substream of an epoch from its start."""
        begin, end = self.ranges[substream].start, self.ranges[substream::SUBSTREAMS][-1].stop
        if self.order_seed is None:
            return self.shards.read(begin, end)
        entries = self.shards.entries
        order = torch.Generator().manual_seed(derive_seed(self.order_seed, "shards", epoch))
        shuffled = [entries[index] for index in torch.randperm(len(entries), generator=order).tolist()]
        samples = replace(self.shards, entries=tuple(shuffled)).read(begin, end)
        # webdataset's shuffle: the next sample is drawn from a buffer, which is then refilled.
        size = _BUFFER // SUBSTREAMS
        generator = random.Random(derive_seed(self.order_seed, "buffer", epoch, begin))  # noqa: S311 (no secret)
        return iter(import_webdataset().shuffle(size, initial=size, rng=generator)(samples))


class ShardData(Batches):
    """Batches of images that are streamed from sharded archives.

    Each substream of each process reads a contiguous range of the concatenated archives, so that every image is read
    once an epoch. Order and views depend on (seed, epoch) and the number of processes, not on the number of workers, of
    which 1, 2, 4 or 8 are used. ``options`` are further arguments of :class:`kd.data.Batches`.
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
        batches = self._train_batches(self._train_ranges(*self._rank_and_world_size()))
        sampler = EpochSampler(range(len(batches)), seed=None, period=self.period)
        sampler.set_epoch(self._next_epoch())
        return self._loader(batches, skip=sampler.skip, sampler=sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return this process's part of the validation images, in the order of the archives."""
        batches = StreamedBatches(self.val_shards, self._val_ranges(*self._rank_and_world_size()), view=self.val_view)
        return self._loader(batches, sampler=EpochSampler(range(len(batches)), seed=None), batch_size=None)

    def validation_indices(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the indices of the validation images of a process, in the order of its batches."""
        return list(chain.from_iterable(self._val_ranges(rank, world_size)))

    def first_views(self, count: int) -> list[tuple[Tensor, int]]:
        """Return the first views of the first epoch, ``(3, S, S)``, uint8, with their labels."""
        views, labels = self._train_batches(self._train_ranges(*self._rank_and_world_size()))[0, 0]
        return list(zip(views[:count], labels[:count].tolist(), strict=True))

    def _train_ranges(self, rank: int, world_size: int) -> list[range]:
        counts, drop_last = self._images_per_process(world_size)
        if self.batch_size == 1:
            # A batch of one image can't weigh less: the first images are repeated if they don't divide evenly.
            counts = [math.ceil(self.train_count / world_size)] * world_size
        return batch_ranges(sum(counts[:rank]), counts[rank], self.batch_size, drop_last=drop_last)

    def _val_ranges(self, rank: int, world_size: int) -> list[range]:
        counts = split_evenly(len(self.val_shards), world_size)
        return batch_ranges(sum(counts[:rank]), counts[rank], self.batch_size)
