"""The images as Lightning takes them."""

import signal
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from kd.data.images import LabelledImages, Splits, hide_labels, joined, keep_fraction
from kd.data.uncut import Uncut, UncutViews, can_be_cut_later, resident_pixels
from kd.data.views import EpochSampler, Views, plain_view, training_view
from kd.errors import UserError
from kd.randomness import derive_seed


class ImageData(LightningDataModule):
    """Batches ``(images, labels)`` of views: ``(B, 3, S, S)``, float32 in [0, 1], and ``(B,)``, int64 (-1: none).

    The views cross to the device as uint8 and become numbers in [0, 1] there, in the layout that ``channels_last``
    says: whoever trains sets it as the network has it. All validation images count, whatever the
    batch size; of the training images none is left out, but for a last batch of a single image, which batch
    normalisation can't take.

    Args:
        splits: The images.
        image_size: Side S of the views, in pixels.
        batch_size: Images in a batch, on each device.
        num_workers: Processes that load images; 0 is the training process itself.
        augment: Name of the augmentation of training images, or ``none``.
        resize: How plain views become square, ``crop`` or ``squash``.
        train_fraction: Part of each class to train on, drawn by the seed.
        seed: What views, order and fraction hang on.
        unlabelled: Images without labels to train on besides.
        unlabelled_rest: Whether to train on what the fraction leaves out too, without its labels.
        reads_labels: Whether the labels of the training images are looked at; else all of them are hidden.
        period: Epochs after which the same views come again in the same order; ``None``: never.
        on_device: Whether training views are cut out on the device, where no more is done to them than that. On a GPU
            the store of decoded images then lies in its memory, if it fits.
        left_out: Called with what is said of a training image that can't be decoded, which is then left out of its
            batch; ``None``: that is an error.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        augment: str = "crop",
        resize: str = "crop",
        train_fraction: float = 1.0,
        seed: int = 0,
        unlabelled: LabelledImages | None = None,
        unlabelled_rest: bool = False,
        reads_labels: bool = True,
        period: int | None = None,
        on_device: bool = False,
        left_out: Callable[[str], object] | None = None,
    ) -> None:
        super().__init__()
        self.splits = splits
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.channels_last = False
        self.period = period
        self.augment = augment
        self.resize = resize
        # Views of images that were made smaller are others than those of the files.
        self.is_decoded = splits.train.is_decoded
        view_seed = None if augment == "none" else seed
        kept = keep_fraction(splits.train, train_fraction, seed=seed)
        everything = range(len(splits.train))
        self.train_indices = list(everything) if unlabelled_rest else kept
        images = splits.train
        if not reads_labels:
            images = hide_labels(images, everything)
        elif unlabelled_rest:
            images = hide_labels(images, sorted(set(everything) - set(kept)))
        if unlabelled is not None:
            self.train_indices += range(len(images), len(images) + len(unlabelled))
            images = joined(images, unlabelled)
        self.has_unlabelled = not reads_labels or unlabelled_rest or unlabelled is not None
        self.train_views = Views(images, training_view(augment, image_size, resize), seed=view_seed, left_out=left_out)
        self.val_views = Views(splits.val, plain_view(image_size, resize), seed=None)
        self.on_device = on_device and can_be_cut_later(self.train_views)
        self._resident: Tensor | None = None

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the training batches of this process, in an order that hangs on (seed, epoch)."""
        rank, world_size = self._place()
        counts, drop_last = self._counts(world_size)
        if drop_last and min(counts) == 1:
            raise UserError("there is a single training image (on each device); training needs at least two")
        sampler = EpochSampler(
            self.train_indices,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            even=self.batch_size == 1,
            period=self.period,
        )
        if self.trainer is not None:
            # Lightning asks for the first batches of a resumed run before it sets the epoch.
            loop = self.trainer.fit_loop
            sampler.set_epoch(loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
            if loop.restarting:
                sampler.skip(loop.epoch_loop.batch_progress.current.processed * self.batch_size)  # type: ignore[attr-defined]
        if not self.on_device:
            return self._loader(self.train_views, sampler, drop_last=drop_last)
        if self.trainer is not None:
            self._resident = resident_pixels(self.train_views, self.trainer.strategy.root_device)
        uncut = UncutViews(self.train_views, resident=self._resident is not None)
        return self._loader(uncut, sampler, drop_last=drop_last)

    def share(self, batch: int) -> float:
        """Return how much this process's batch counts in the mean over all processes' batches of a step.

        Where the images can't be shared out evenly, the last batches are not of one size.

        Args:
            batch: Its number in the epoch.

        Returns:
            1 where all are of one size.
        """
        rank, world_size = self._place()
        counts, drop_last = self._counts(world_size)
        left = [count - batch * self.batch_size for count in counts]
        if world_size == 1 or drop_last or self.batch_size == 1 or min(left) >= self.batch_size:
            return 1.0
        sizes = [min(one, self.batch_size) for one in left]
        return sizes[rank] * world_size / sum(sizes)

    def _counts(self, world_size: int) -> tuple[list[int], bool]:
        """Count each process's images of an epoch; say whether all leave out their last batch.

        All do where one of them would be left with a single image, which batch normalisation can't take; so all make
        the same number of steps.
        """
        counts = [len(range(rank, len(self.train_indices), world_size)) for rank in range(world_size)]
        return counts, self.batch_size > 1 and any(count % self.batch_size == 1 for count in counts)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return this process's part of all validation images.

        They come in an order that is always the same, but not that of the classes: where a limit lets only the first
        batches through, all classes are among them.
        """
        return self._loader(self.val_views, EpochSampler(self.validation_indices(*self._place()), seed=None))

    def validation_indices(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return which validation images a process measures, in their order."""
        generator = torch.Generator().manual_seed(derive_seed("validation order"))
        order: list[int] = torch.randperm(len(self.splits.val), generator=generator).tolist()
        return order[rank::world_size]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401, ARG002 (Lightning's)
        """Turn bytes into numbers in [0, 1] on the device, and cut views out where that is yet to be done."""
        images, labels = batch
        if isinstance(images, Uncut):
            views = images.cut(self._resident)
            return views if self.channels_last else views.contiguous(), labels
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(torch.float32, memory_format=layout).div_(255), labels

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(
        self, views: Dataset[Any], sampler: EpochSampler, *, drop_last: bool = False
    ) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            views,
            # Its annotation asks for plain indices; ours carry the epoch.
            batch_sampler=BatchSampler(sampler, self.batch_size, drop_last=drop_last),  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=_as_it_is,  # The views put a batch together themselves.
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals_to_the_training,
            pin_memory=torch.cuda.is_available(),
        )


def _leave_signals_to_the_training(worker: int) -> None:  # noqa: ARG001 (torch's signature)
    """Go on when all processes are asked to stop: the training ends its step, and then its workers."""
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:  # noqa: ANN401 (a batch of any form)
    return batch
