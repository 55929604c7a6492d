"""The data module that training uses, whatever the source of the images."""

import signal
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.data.images import Label, Splits
from kd.data.views import plain_view, training_view
from kd.errors import UserError

_WAITING: list[float] = []


class Batches(LightningDataModule):
    """Base class: batches ``(images, labels)``, ``(B, 3, S, S)`` float32 in [0, 1] and ``(B,)`` int64 (-1: no label).

    Images are moved to the device as uint8 and converted there, to the memory format of the network if the training
    sets ``channels_last``.

    Args:
        splits: The images.
        image_size: Side length S of the views, in pixels.
        batch_size: Images in a batch, per device.
        num_workers: Processes that load images; 0 loads them in the training process.
        augment: The augmentation of training images, as of :func:`kd.data.views.training_view`.
        erasing: Probability of erasing a random rectangle of a training image.
        resize: How images become square without augmentation, ``crop`` or ``squash``.
        seed: Seed of views and order.
        reads_labels: Whether the labels of the training images are used; otherwise all of them are hidden.
        period: Number of distinct views per image, one an epoch; the sequence then repeats. ``None``: never.
        left_out: Called with the error message of a training image that can't be decoded, which is then left out of its
            batch; ``None`` raises the error.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        augment: str = "crop",
        erasing: float = 0.0,
        resize: str = "crop",
        seed: int = 0,
        reads_labels: bool = True,
        period: int | None = None,
        left_out: Callable[[str], object] | None = None,
    ) -> None:
        super().__init__()
        self.splits = splits
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.erasing = erasing
        self.resize = resize
        self.seed = seed
        self.reads_labels = reads_labels
        self.period = period
        self.left_out = left_out
        self.has_unlabeled = not reads_labels
        self.channels_last = False
        self.train_view = training_view(augment, image_size, resize, erasing=erasing)
        self.val_view = plain_view(image_size, resize)
        self.view_seed = None if augment == "none" and not erasing else seed

    @property
    @abstractmethod
    def train_count(self) -> int:
        """Number of training images of an epoch, over all processes."""

    @abstractmethod
    def validation_indices(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the indices of the validation images of a process, in the order of its batches."""

    @abstractmethod
    def first_views(self, count: int) -> list[tuple[Tensor, Label]]:
        """Return the first views of the first epoch, ``(3, S, S)``, uint8, with their labels."""

    @abstractmethod
    def sample_views(self, count: int) -> Iterator[Tensor]:
        """Yield batches ``(B, 3, S, S)``, uint8, of the first ``count`` views of the first epoch, in each process."""

    def batch_weight(self, batch: int, *, accumulate: int = 1, batches: int | None = None) -> float:
        """Return the weight of a batch in the mean over the images of an optimizer step; 1 if all sizes are equal.

        A step is the mean over processes and accumulated batches; with these weights, it is that over their images.

        Args:
            batch: Number of the batch in the epoch.
            accumulate: Number of batches of a process whose gradients are accumulated.
            batches: Number of batches of an epoch, at whose end fewer may be accumulated; ``None``: any.
        """
        rank, world_size = self._rank_and_world_size()
        counts, _ = self._images_per_process(world_size)

        def size(process: int, number: int) -> int:
            # Of single images, the first ones are repeated if they don't divide evenly.
            left = counts[process] - number * self.batch_size
            return 1 if self.batch_size == 1 else max(0, min(left, self.batch_size))

        first = batch - batch % accumulate
        numbers = range(first, first + accumulate if batches is None else min(first + accumulate, batches))
        total = sum(size(process, number) for process in range(world_size) for number in numbers)
        return size(rank, batch) * world_size * accumulate / total

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401, ARG002 (Lightning's)
        """Convert uint8 to float32 in [0, 1] on the device."""
        images, labels = batch
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(torch.float32, memory_format=layout).div_(255), labels

    def _images_per_process(self, world_size: int) -> tuple[list[int], bool]:
        """Return each process's number of images in an epoch, and whether all processes drop their last batch.

        They do if one of these batches is a single image, on which batch normalization fails.
        """
        counts = split_evenly(self.train_count, world_size)
        drop_last = self.batch_size > 1 and any(count % self.batch_size == 1 for count in counts)
        if drop_last and min(counts) == 1:
            raise UserError("training needs at least two images per device; there is one")
        return counts, drop_last

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _next_epoch(self) -> int:
        """Return the epoch of the training loader; a resumed run reads batches before Lightning sets its sampler's."""
        return 0 if self.trainer is None else int(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]

    def _batches_done(self) -> int:
        """Return the number of batches of the epoch trained on; the loader, which prefetches, is ahead of it."""
        return 0 if self.trainer is None else int(self.trainer.fit_loop.epoch_loop.batch_progress.current.processed)  # type: ignore[attr-defined]

    def shared_memory(self) -> int:
        """Return the bytes of shared memory that the batches in flight from loader processes take; 0 without any."""
        ahead = 2 * self.num_workers + 1
        return ahead * self.batch_size * 3 * self.image_size**2 if self.num_workers else 0

    def _loader(
        self, dataset: Dataset[Any], *, skip: Callable[[int], None] | None = None, **options: Any
    ) -> DataLoader[tuple[Tensor, int]]:
        """Return a loader of a dataset of whole batches; with ``skip``, its position is part of checkpoints."""
        options |= {
            "num_workers": self.num_workers,
            "collate_fn": _unchanged,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": _ignore_signals,
            "pin_memory": torch.cuda.is_available(),
        }
        if skip is None:
            return WatchedLoader(dataset, **options)
        return ResumableLoader(dataset, batches_done=self._batches_done, skip=skip, **options)


class WatchedLoader(DataLoader[tuple[Tensor, int]]):
    """A loader that records since when the training has been waiting for a batch."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch declares a class of its own
        """Yield the batches."""
        batches = super().__iter__()
        while True:
            _WAITING.append(time.monotonic())
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                _WAITING.pop()
            yield batch


def seconds_waited() -> float:
    """Return for how long this process has been waiting for a batch; 0 if it isn't."""
    return time.monotonic() - _WAITING[-1] if _WAITING else 0.0


class ResumableLoader(WatchedLoader):
    """A loader with a state dict: the number of batches of the epoch that were trained on, which ``skip`` skips."""

    def __init__(
        self, dataset: Dataset[Any], *, batches_done: Callable[[], int], skip: Callable[[int], None], **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self._batches_done = batches_done
        self._skip = skip

    def state_dict(self) -> dict[str, int]:
        """Return the position within the epoch."""
        return {"batches": self._batches_done()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a position."""
        self._skip(state_dict["batches"])


def split_evenly(count: int, world_size: int) -> list[int]:
    """Return the number of images per process; the first ones have one more where they don't divide evenly."""
    return [len(range(rank, count, world_size)) for rank in range(world_size)]


def _ignore_signals(worker: int) -> None:  # noqa: ARG001 (torch's signature)
    """Ignore signals that all processes receive: the training process finishes its step, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:  # noqa: ANN401 (a batch of any form)
    """Collate a batch that the dataset has returned as a whole."""
    return batch
