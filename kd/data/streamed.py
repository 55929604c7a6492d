"""The data module of images that are streamed from sharded archives."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kd.data.batches import Batches, split_evenly
from kd.data.images import UNLABELED, LabeledImages
from kd.data.samples import Sample, import_webdataset, stream
from kd.data.shards import ShardedSplits, Shards
from kd.data.substreams import SUBSTREAMS, Substreams, shard_ranges, usable_workers
from kd.data.views import View, Views, plain_view, training_view
from kd.randomness import derive_seed

_BUFFER = 2048
"""Encoded images in a process's shuffle buffers, over all of its substreams."""


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

    def __init__(
        self,
        shards: Shards,
        substreams: Substreams,
        *,
        view: View,
        order_seed: int | None = None,
        view_seed: int | None = None,
        reads_labels: bool = True,
        left_out: Callable[[str], object] | None = None,
    ) -> None:
        self.shards = shards
        self.substreams = substreams
        self.view = view
        self.order_seed = order_seed
        self.view_seed = view_seed
        self.reads_labels = reads_labels
        self.left_out = left_out
        self._readers: dict[int, _Reader] = {}

    def __len__(self) -> int:
        """Count the batches."""
        return self.substreams.batches

    def __getitem__(self, which: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return a batch: views ``(B, 3, S, S)``, uint8, and labels ``(B,)``."""
        epoch, batch = which
        samples = self.samples(epoch, batch)
        images = LabeledImages(
            classes=self.shards.classes,
            labels=[sample.label if self.reads_labels else UNLABELED for sample in samples],
            keys=[sample.key for sample in samples],
            load=partial(_decode, samples),
        )
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
        entries = self.shards.entries
        if self.order_seed is not None:
            generator = torch.Generator().manual_seed(derive_seed(self.order_seed, "shards", epoch))
            entries = tuple(entries[index] for index in torch.randperm(len(entries), generator=generator).tolist())
        for number, first, last in shard_ranges([one.images for one in entries], begin, end):
            yield from stream(entries[number], first, last, classes=len(self.shards.classes))


class _Reader(NamedTuple):
    """An open substream: its epoch, the number of samples read, and the samples to come."""

    epoch: int
    samples_read: int
    samples: Iterator[Sample]


class BatchNumbers(Sampler[tuple[int, int]]):
    """Yields ``(epoch, batch)``, so that workers need no state of their own.

    Args:
        batches: Number of batches in an epoch.
        period: Number of epochs after which the views repeat; ``None``: never.
    """

    def __init__(self, batches: int, *, period: int | None = None) -> None:
        self.batches = batches
        self.period = period
        self.epoch = 0
        self._skipped = 0

    def skip(self, batches: int) -> None:
        """Skip the first batches of the next epoch, which were trained on before a run was resumed."""
        self._skipped = batches

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch; Lightning calls it."""
        self.epoch = epoch if self.period is None else epoch % self.period

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over the batches of the epoch."""
        # A generator, so that the skip is used up only when batches are: a loader with workers discards an iterator.
        skipped, self._skipped = self._skipped, 0
        for batch in range(skipped, self.batches):
            yield self.epoch, batch


class ShardData(Batches):
    """Batches of images that are streamed from sharded archives.

    Each substream of each process reads a contiguous range of the concatenated archives, so that every image is read
    once an epoch, whatever the number of archives, processes and workers; a range that begins within an archive skips
    what is before it. Order and views depend on (seed, epoch) and the number of processes, not on the workers.

    Args:
        splits: The archives.
        image_size: Side length S of the views, in pixels.
        batch_size: Images in a batch, per device.
        num_workers: Processes that load images, of which 1, 2, 4 or 8 are used; 0 loads them in the training process.
        augment: Name of the augmentation of training images, or ``none``.
        resize: How images become square without augmentation, ``crop`` or ``squash``.
        seed: Seed of views and order.
        reads_labels: Whether the labels of the training images are used; otherwise all of them are hidden.
        period: Number of distinct views per image, one an epoch; the sequence then repeats. ``None``: never.
        left_out: Called with what is said of a training image that can't be decoded, which is then left out of its
            batch; ``None``: that is an error.
    """

    def __init__(
        self,
        splits: ShardedSplits,
        *,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        augment: str = "crop",
        resize: str = "crop",
        seed: int = 0,
        reads_labels: bool = True,
        period: int | None = None,
        left_out: Callable[[str], object] | None = None,
    ) -> None:
        super().__init__(
            splits,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=usable_workers(num_workers),
            seed=seed,
            period=period,
            has_unlabeled=not reads_labels,
        )
        self.val_shards = splits.val_shards
        self._train_batches = partial(
            StreamedBatches,
            splits.train_shards,
            view=training_view(augment, image_size, resize),
            order_seed=seed,
            view_seed=None if augment == "none" else seed,
            reads_labels=reads_labels,
            left_out=left_out,
        )
        self._val_view = plain_view(image_size, resize)

    @property
    def train_count(self) -> int:
        """Number of training images of an epoch, over all processes."""
        return self.splits.train_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the training batches of this process, in an order that depends on (seed, epoch)."""
        batches = self._train_batches(self._train_substreams(*self._rank_and_world_size()))
        numbers = BatchNumbers(len(batches), period=self.period)
        numbers.set_epoch(self._next_epoch())
        return self._training_loader(batches, skip=numbers.skip, sampler=numbers, batch_size=None)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return this process's part of the validation images, in the order of the archives."""
        batches = StreamedBatches(
            self.val_shards, self._val_substreams(*self._rank_and_world_size()), view=self._val_view
        )
        return self._loader(batches, sampler=BatchNumbers(len(batches)), batch_size=None)

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


def _decode(samples: list[Sample], index: int) -> Tensor:
    return samples[index].decode()
