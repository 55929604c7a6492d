"""Images that are streamed from sharded archives, as Lightning takes them."""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.utils.data import DataLoader

from kd.data.batches import Batches, shares
from kd.data.shards import ShardedSplits
from kd.data.streams import BatchNumbers, StreamedBatches
from kd.data.substreams import Substreams, usable_workers
from kd.data.views import plain_view, training_view


class ShardData(Batches):
    """Batches of images that are streamed from sharded archives.

    Each process and each of its lanes reads a piece of the line of all archives, so that every image is read once in an
    epoch, however many archives, processes and workers there are; a piece that begins within an archive reads past
    what is before it. Order and views hang on (seed, epoch) and on how many processes there are, not on the workers.

    Args:
        splits: The archives.
        image_size: Side S of the views, in pixels.
        batch_size: Images in a batch, on each device.
        num_workers: Processes that load images, of which 1, 2, 4 or 8 are made use of; 0 is the training process.
        augment: Name of the augmentation of training images, or ``none``.
        resize: How plain views become square, ``crop`` or ``squash``.
        seed: What views and order hang on.
        reads_labels: Whether the labels of the training images are looked at; else all of them are hidden.
        period: Epochs after which the same views come again in the same order; ``None``: never.
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
        """How many training images an epoch has, over all processes."""
        return self.splits.train_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the training batches of this process, in an order that hangs on (seed, epoch)."""
        batches = self._train_batches(self._train_lanes(*self._place()))
        numbers = BatchNumbers(len(batches), period=self.period)
        numbers.set_epoch(self._next_epoch())
        return self._training_loader(batches, skip=numbers.skip, sampler=numbers, batch_size=None)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return this process's part of all validation images, in the order of the archives."""
        batches = StreamedBatches(self.val_shards, self._val_lanes(*self._place()), view=self._val_view)
        return self._loader(batches, sampler=BatchNumbers(len(batches)), batch_size=None)

    def validation_indices(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return which validation images a process measures, in their order."""
        return list(self._val_lanes(rank, world_size).line())

    def first_views(self, count: int) -> list[tuple[Tensor, int]]:
        """Return the first views of the first epoch, ``(3, S, S)``, uint8, with their labels."""
        views, labels = self._train_batches(self._train_lanes(*self._place()))[0, 0]
        return list(zip(views[:count], labels[:count].tolist(), strict=True))

    def _train_lanes(self, rank: int, world_size: int) -> Substreams:
        counts, drop_last = self._counts(world_size)
        if self.batch_size > 1:
            return Substreams(sum(counts[:rank]), counts[rank], self.batch_size, drop_last)
        # A batch of one image can't count for less: where they do not come out even, the first ones are given again.
        even = math.ceil(self.train_count / world_size)
        return Substreams(rank * even, even, 1)

    def _val_lanes(self, rank: int, world_size: int) -> Substreams:
        counts = shares(len(self.val_shards), world_size)
        return Substreams(sum(counts[:rank]), counts[rank], self.batch_size)
