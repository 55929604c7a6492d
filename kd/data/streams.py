"""Batches of views of images that are streamed from sharded archives."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kd.data.images import UNLABELED, LabeledImages
from kd.data.samples import Sample, import_webdataset, stream
from kd.data.shards import Shards
from kd.data.substreams import SUBSTREAMS, Substreams, shard_ranges
from kd.data.views import View, Views
from kd.randomness import derive_seed

_BUFFER = 2048
"""Images, as they are encoded, that a process holds to draw the next ones from; its lanes share them out."""


class StreamedBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of views with their labels, asked for by ``(epoch, batch)``.

    What a batch holds is a function of these two and of the lanes, whoever asks; to ask for the batches of a lane one
    after the other is what is fast, as an archive is read in its order.

    Args:
        shards: The archives.
        lanes: The part that is read.
        view: What makes a square of each image.
        order_seed: What the order hangs on, with the epoch; ``None`` keeps that of the archives.
        view_seed: What the views hang on, with the epoch and the image's key; ``None`` for a view without chance.
        reads_labels: Whether the labels are looked at.
        left_out: As of :class:`kd.data.views.Views`.
    """

    def __init__(
        self,
        shards: Shards,
        lanes: Substreams,
        *,
        view: View,
        order_seed: int | None = None,
        view_seed: int | None = None,
        reads_labels: bool = True,
        left_out: Callable[[str], object] | None = None,
    ) -> None:
        self.shards = shards
        self.lanes = lanes
        self.view = view
        self.order_seed = order_seed
        self.view_seed = view_seed
        self.reads_labels = reads_labels
        self.left_out = left_out
        self._open: dict[int, _Lane] = {}

    def __len__(self) -> int:
        """Count the batches."""
        return self.lanes.batches

    def __getitem__(self, which: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return a batch: views ``(B, 3, S, S)``, uint8, and labels ``(B,)``."""
        epoch, batch = which
        samples = self.samples(epoch, batch)
        images = LabeledImages(
            classes=self.shards.classes,
            labels=[sample.label if self.reads_labels else UNLABELED for sample in samples],
            keys=[sample.key for sample in samples],
            load=partial(_decoded_at, samples),
        )
        views = Views(images, self.view, seed=self.view_seed, left_out=self.left_out)
        return views.__getitems__([(epoch, index) for index in range(len(samples))])

    def samples(self, epoch: int, batch: int) -> list[Sample]:
        """Return the samples of a batch, as they are encoded."""
        lane, before = batch % SUBSTREAMS, self.lanes.before(batch)
        known = self._open.pop(lane, None)
        if known is None or (known.epoch, known.given) != (epoch, before):
            # Another epoch, or one that is resumed: what was given before is read past, and not decoded.
            known = _Lane(epoch, before, islice(self._lane(epoch, lane), before, None))
        size = self.lanes.size(batch)
        samples = list(islice(known.samples, size))
        if batch + SUBSTREAMS < self.lanes.batches:
            self._open[lane] = known._replace(given=before + size)
        return samples

    def _lane(self, epoch: int, lane: int) -> Iterator[Sample]:
        """Read a lane of an epoch from its beginning."""
        begin, end = self.lanes.piece(lane)
        samples = self._line(epoch, begin, end)
        if self.order_seed is None:
            return samples
        # By webdataset: the next one is drawn from a buffer, which is filled up again.
        size = _BUFFER // SUBSTREAMS
        generator = random.Random(derive_seed(self.order_seed, "buffer", epoch, begin))  # noqa: S311 (no secret)
        shuffled: Iterator[Sample] = iter(import_webdataset().shuffle(size, initial=size, rng=generator)(samples))
        return shuffled

    def _line(self, epoch: int, begin: int, end: int) -> Iterator[Sample]:
        """Read a piece of the line of all archives, which stand in another order in each epoch."""
        entries = self.shards.entries
        if self.order_seed is not None:
            generator = torch.Generator().manual_seed(derive_seed(self.order_seed, "shards", epoch))
            entries = tuple(entries[index] for index in torch.randperm(len(entries), generator=generator).tolist())
        for number, first, last in shard_ranges([one.images for one in entries], begin, end):
            yield from stream(entries[number], first, last, classes=len(self.shards.classes))


class _Lane(NamedTuple):
    """A lane that is being read: of which epoch, how many images it gave, and those to come."""

    epoch: int
    given: int
    samples: Iterator[Sample]


class BatchNumbers(Sampler[tuple[int, int]]):
    """Gives ``(epoch, batch)``: the workers need no state to know what comes next.

    Args:
        batches: How many an epoch has.
        period: After so many epochs they come again; ``None``: never.
    """

    def __init__(self, batches: int, *, period: int | None = None) -> None:
        self.batches = batches
        self.period = period
        self.epoch = 0
        self._skipped = 0

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the epoch that comes next: a resumed one gave them before."""
        self._skipped = batches

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; Lightning calls it."""
        self.epoch = epoch if self.period is None else epoch % self.period

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over the batches of the epoch."""
        # As they are asked for: a loader with workers makes an iterator that it does not use.
        skipped, self._skipped = self._skipped, 0
        for batch in range(skipped, self.batches):
            yield self.epoch, batch


def _decoded_at(samples: list[Sample], index: int) -> Tensor:
    return samples[index].decode()
