"""The data module of images that are streamed from sharded archives."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from itertools import accumulate, chain, islice, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.data.batches import Batches, split_evenly
from kd.data.images import Label, hide_labels
from kd.data.samples import Sample, import_webdataset
from kd.data.shards import ShardedSplits, Shards, images_of
from kd.data.views import EpochSampler, View, Views
from kd.randomness import derive_seed

_SLOTS = 8
"""Steps take turns in so many groups of substreams, so that the order is the same for any number of workers."""

_PARTS = 4
"""Parts of each step with a substream of their own, so that up to so many processes can share them."""

_BUFFER = 2048
"""Encoded images in the shuffle buffers, over all substreams."""


class Piece(NamedTuple):
    """The images ``first`` to ``last`` - 1 of a substream, itself a range of the concatenated archives."""

    substream: range
    first: int
    last: int


def parts_of_step(world_size: int) -> int:
    """Return the number of parts of a step, on which the order of the images depends."""
    return max(_PARTS, world_size)


def plan_batches(count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[Piece]]:
    """Return the pieces that each batch of a process consists of.

    Each step, the batches of all processes together, has the same images for any number of processes up to 4 at the
    same number of images per step: step ``i`` is divided into parts, each read from its own substream for ``i % 8``.

    Args:
        count: Number of images of an epoch, over all processes.
        batch_size: Images in a batch of each process.
        rank: Rank of the process.
        world_size: Number of processes.
    """
    images_per_step, parts, start = batch_size * world_size, parts_of_step(world_size), 0
    sizes = [min(images_per_step, count - first) for first in range(0, count, images_per_step)]
    # Where the process's images, and each part, begin and end in each batch.
    own = [_bounds(size, world_size)[rank : rank + 2] for size in sizes]
    bounds = [_bounds(size, parts) for size in sizes]
    pieces: list[list[Piece]] = [[] for _ in sizes]
    for part, slot in product(range(parts), range(_SLOTS)):
        batches = range(slot, len(sizes), _SLOTS)
        lengths = [bounds[batch][part + 1] - bounds[batch][part] for batch in batches]
        substream, read = range(start, start + sum(lengths)), 0
        for batch, length in zip(batches, lengths, strict=True):
            begin = bounds[batch][part]
            first, last = max(own[batch][0], begin) - begin, min(own[batch][1], begin + length) - begin
            if first < last:
                pieces[batch].append(Piece(substream, read + first, read + last))
            read += length
        start = substream.stop
    return pieces


def _bounds(size: int, parts: int) -> list[int]:
    return [0, *accumulate(split_evenly(size, parts))]


def usable_workers(workers: int) -> int:
    """Return the largest number of workers, at most ``workers``, among which the groups of substreams divide evenly.

    Example:
        >>> [usable_workers(workers) for workers in (0, 1, 3, 7, 16)]
        [0, 1, 2, 4, 8]
    """
    return max((count for count in range(1, min(workers, _SLOTS) + 1) if _SLOTS % count == 0), default=0)


@dataclass(eq=False)
class StreamedBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of views with their labels, indexed by ``(epoch, batch)``; fast if batches are read in order.

    ``plan`` is from `plan_batches`. Images are shuffled by ``order_seed`` and the epoch; ``None`` keeps the order of
    the archives. ``view``, ``view_seed`` and ``left_out`` are as of :class:`kd.data.views.Views`.
    """

    shards: Shards
    plan: Sequence[Sequence[Piece]]
    _: KW_ONLY
    view: View
    order_seed: int | None = None
    view_seed: int | None = None
    reads_labels: bool = True
    left_out: Callable[[str], object] | None = None
    # By substream: the epoch, the number of samples read, and the remaining samples.
    _readers: dict[range, tuple[int, int, Iterator[Sample]]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.plan)

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
        return [sample for piece in self.plan[batch] for sample in self._read(epoch, piece)]

    def _read(self, epoch: int, piece: Piece) -> list[Sample]:
        last_epoch, position, samples = self._readers.pop(piece.substream, (None, 0, iter(())))
        if last_epoch != epoch or position > piece.first:
            position, samples = 0, self._open(epoch, piece.substream)
        # Samples of other processes, or from before a resumed epoch's position, are skipped without decoding.
        read = list(islice(samples, piece.first - position, piece.last - position))
        if piece.last < len(piece.substream):
            self._readers[piece.substream] = (epoch, piece.last, samples)
        return read

    def _open(self, epoch: int, substream: range) -> Iterator[Sample]:
        """Read a substream of an epoch from its start."""
        if self.order_seed is None:
            return self.shards.read(substream.start, substream.stop)
        entries = self.shards.entries
        order = torch.Generator().manual_seed(derive_seed(self.order_seed, "shards", epoch))
        shuffled = [entries[index] for index in torch.randperm(len(entries), generator=order).tolist()]
        # Substreams begin elsewhere in each epoch, so that an image meets others even if there is a single shard.
        offset = int(torch.randint(len(self.shards), (), generator=order))
        samples = replace(self.shards, entries=tuple(shuffled)).read(substream.start + offset, substream.stop + offset)
        # webdataset's shuffle: the next sample is drawn from a buffer, which is then refilled.
        size = _BUFFER // (_SLOTS * _PARTS)
        generator = random.Random(derive_seed(self.order_seed, "buffer", epoch, substream.start))  # noqa: S311 (no secret)
        return iter(import_webdataset().shuffle(size, initial=size, rng=generator)(samples))


class ShardData(Batches):
    """Batches of images that are streamed from sharded archives.

    Each substream is a contiguous range of the concatenated archives, so that every image is read once an epoch. Order
    and views depend on (seed, epoch) and the number of images per step, not on the number of workers, of which 1, 2, 4
    or 8 are used, and not on that of processes, if there are at most 4. ``options`` are further arguments of
    :class:`kd.data.Batches`.
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
        batches = self._train_batches(self._train_plan(*self._rank_and_world_size()))
        sampler = EpochSampler(range(len(batches)), seed=None, period=self.period)
        sampler.set_epoch(self._next_epoch())
        return self._loader(batches, skip=sampler.skip, sampler=sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return this process's part of the validation images, in the order of the archives."""
        batches = StreamedBatches(self.val_shards, self._val_plan(*self._rank_and_world_size()), view=self.val_view)
        return self._loader(batches, sampler=EpochSampler(range(len(batches)), seed=None), batch_size=None)

    def validation_indices(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the indices of the validation images of a process, in the order of its batches."""
        pieces = chain.from_iterable(self._val_plan(rank, world_size))
        return [index for piece in pieces for index in piece.substream[piece.first : piece.last]]

    def first_views(self, count: int) -> list[tuple[Tensor, Label]]:
        """Return the first views of the first epoch, ``(3, S, S)``, uint8, with their labels."""
        views, labels = self._train_batches(self._train_plan(*self._rank_and_world_size()))[0, 0]
        return list(zip(views[:count], labels[:count].tolist(), strict=True))

    def sample_views(self, count: int) -> Iterator[Tensor]:
        """Yield batches ``(B, 3, S, S)``, uint8, of the first ``count`` views of the first epoch, in each process."""
        # The first process's, as if there were no others.
        batches = self._train_batches(self._train_plan(0, 1))
        for index in range(min(len(batches), math.ceil(count / self.batch_size))):
            yield batches[0, index][0]

    def _train_plan(self, rank: int, world_size: int) -> list[list[Piece]]:
        _, drop_last = self._images_per_process(world_size)
        count, images_per_step = self.train_count, self.batch_size * world_size
        if drop_last:
            count -= count % images_per_step
        elif self.batch_size == 1:
            # A batch of one image can't weigh less: the first images are repeated if they don't divide evenly.
            count += -count % world_size
        return plan_batches(count, self.batch_size, rank, world_size)

    def _val_plan(self, rank: int, world_size: int) -> list[list[Piece]]:
        return plan_batches(len(self.val_shards), self.batch_size, rank, world_size)
