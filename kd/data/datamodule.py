"""The data module of images that are read one by one."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from kd.data.batches import Batches
from kd.data.deferred_crops import DeferredCropDataset, DeferredCrops, can_defer_crops, resident_pixels
from kd.data.images import UNLABELED, Label, LabeledImages, Splits, concatenate, hide_labels, keep_fraction
from kd.data.views import EpochSampler, Views
from kd.randomness import derive_seed


class ImageData(Batches):
    """Batches of images that are read one by one.

    All validation images are used, whatever the batch size, and all training images, except for a last batch of a
    single image, on which batch normalization fails.

    Args:
        splits: The images.
        train_fraction: Fraction of each class to train on, drawn by the seed.
        unlabeled: Further training images without labels.
        unlabeled_rest: Whether to also train on the images that the fraction leaves out, without their labels.
        balanced: Whether each class is drawn equally often in an epoch, with replacement; unlabeled images are drawn
            as often as without it.
        on_device: Whether training images are cropped on the device, if the augmentation is a crop and a flip only. On
            a GPU, the cache of decoded images is then kept in its memory, if it fits.
        options: Further arguments of :class:`kd.data.Batches`.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        train_fraction: float = 1.0,
        unlabeled: LabeledImages | None = None,
        unlabeled_rest: bool = False,
        balanced: bool = False,
        on_device: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(splits, **options)
        self.has_unlabeled = self.has_unlabeled or unlabeled_rest or unlabeled is not None
        # Views of downscaled images differ from those of the original files.
        self.cached_side = splits.train.cached_side
        kept = keep_fraction(splits.train, train_fraction, seed=self.seed)
        everything, labeled = range(len(splits.train)), kept if self.reads_labels else []
        self.train_indices = list(everything) if unlabeled_rest else kept
        images = hide_labels(splits.train, set(self.train_indices) - set(labeled))
        if unlabeled is not None:
            self.train_indices += range(len(images), len(images) + len(unlabeled))
            images = concatenate(images, unlabeled)
        self.train_weights = _balance([images.strata[index] for index in self.train_indices]) if balanced else None
        self.train_views = Views(images, self.train_view, seed=self.view_seed, left_out=self.left_out)
        self.val_views = Views(splits.val, self.val_view, seed=None)
        self.on_device = on_device and can_defer_crops(self.train_views)
        self._resident: Tensor | None = None

    @property
    def train_count(self) -> int:
        """Number of training images of an epoch, over all processes."""
        return len(self.train_indices)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the training batches of this process, in an order that depends on (seed, epoch)."""
        rank, world_size = self._rank_and_world_size()
        _, drop_last = self._images_per_process(world_size)
        even = self.batch_size == 1
        sampler = EpochSampler(
            self.train_indices,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            weights=self.train_weights,
            even=even,
            period=self.period,
        )
        sampler.set_epoch(self._next_epoch())
        views: Dataset[Any] = self.train_views
        if self.on_device:
            if self.trainer is not None:
                self._resident = resident_pixels(self.train_views, self.trainer.strategy.root_device)
            views = DeferredCropDataset(self.train_views, resident=self._resident is not None)
        options = self._batched(sampler, drop_last=drop_last)
        return self._loader(views, skip=lambda batches: sampler.skip(batches * self.batch_size), **options)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return this process's part of the validation images.

        Their order is always the same, but not sorted by class, so that the first batches hold all classes.
        """
        sampler = EpochSampler(self.validation_indices(*self._rank_and_world_size()), seed=None)
        return self._loader(self.val_views, **self._batched(sampler, drop_last=False))

    def validation_indices(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the indices of the validation images of a process, in the order of its batches."""
        generator = torch.Generator().manual_seed(derive_seed("validation order"))
        order: list[int] = torch.randperm(len(self.splits.val), generator=generator).tolist()
        return order[rank::world_size]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401 (Lightning's)
        """Convert uint8 to float32 in [0, 1] on the device, after cropping images whose crops were deferred."""
        images, labels = batch
        if isinstance(images, DeferredCrops):
            views = images.crop(self._resident)
            return views if self.channels_last else views.contiguous(), labels
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def first_views(self, count: int) -> list[tuple[Tensor, Label]]:
        """Return the first views of the first epoch, ``(3, S, S)``, uint8, with their labels."""
        return [self.train_views[each] for each in islice(EpochSampler(self.train_indices, seed=self.seed), count)]

    def sample_views(self, count: int) -> Iterator[Tensor]:
        """Yield batches ``(B, 3, S, S)``, uint8, of the first ``count`` views of the first epoch, in each process."""
        positions = list(islice(EpochSampler(self.train_indices, seed=self.seed, weights=self.train_weights), count))
        for start in range(0, len(positions), self.batch_size):
            yield self.train_views.__getitems__(positions[start : start + self.batch_size])[0]

    def _batched(self, sampler: EpochSampler, *, drop_last: bool) -> dict[str, Any]:
        # Annotated for plain indices; these carry the epoch.
        return {"batch_sampler": BatchSampler(sampler, self.batch_size, drop_last=drop_last)}  # type: ignore[arg-type]


def _balance(labels: Sequence[int]) -> list[float]:
    """Return the frequency of each image with which all classes are drawn equally often, in units of its own."""
    counts = Counter(labels)
    labeled = len(labels) - counts.pop(UNLABELED, 0)
    return [1.0 if label == UNLABELED else labeled / (len(counts) * counts[label]) for label in labels]
