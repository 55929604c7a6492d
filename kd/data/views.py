"""Views: one square version of an image, a pure function of (seed, epoch, image)."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from kd.data.crops import RandomResizedCrop, ResizedCrop, crop_image
from kd.data.images import LabeledImages
from kd.errors import UserError
from kd.pixels import plain_side
from kd.randomness import derive_seed, seeded
from kd.registry import Registry

View = Callable[[Tensor], Tensor]

_DETAIL = 2

AUGMENTATIONS: Registry[Callable[[int], list[View]]] = Registry("augmentation")
"""By name: a function of the image size in pixels that gives the random transforms, uint8 to uint8, in order."""


@AUGMENTATIONS.register("crop")
def crop(size: int) -> list[View]:
    """Cut 8 to 100 % of the area at 3:4 to 4:3 and flip half of them; Szegedy et al. (2014), section 6."""
    return [RandomResizedCrop(size)]


@AUGMENTATIONS.register("rotate")
def rotate(size: int) -> list[View]:
    """Rotate by up to 30 degrees, then as ``crop``, in one sampling."""
    return [RandomResizedCrop(size, degrees=30.0)]


@AUGMENTATIONS.register("trivial")
def trivial(size: int) -> list[View]:
    """As ``crop``, then one random operation of random strength; Müller & Hutter (2021), arXiv:2103.10158."""
    return [*crop(size), v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)]


@AUGMENTATIONS.register("rand")
def rand(size: int) -> list[View]:
    """As ``crop``, then two random operations of magnitude 9; Cubuk et al. (2019), arXiv:1909.13719."""
    return [*crop(size), v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)]


def short_side(size: int, augment: str = "none") -> int:
    """Return how long the short side of an image must be that views are cut out of, in pixels.

    A plain view shows 7/8 of it. One that is cut out shows a part, down to 8 % of the area, which must not be the
    enlargement of an image that was made too small before: a student that learns from blurred views is a worse one.

    Args:
        size: Side of the views, in pixels.
        augment: As of :func:`training_view`.
    """
    return plain_side(size) if augment == "none" else round(size * _DETAIL)


def plain_view(size: int, resize: str = "crop") -> View:
    """Return the view without chance, of validation images.

    Args:
        size: Side of the square, in pixels.
        resize: ``crop`` resizes the short side to 8/7 of ``size`` and cuts the center (256 to 224 is the field's
            habit); ``squash`` resizes to the square regardless of proportions.
    """
    if resize == "squash":
        return _in_order([v2.Resize((size, size), antialias=True)])
    return _in_order([v2.Resize(short_side(size), antialias=True), v2.CenterCrop(size)])


def training_view(augment: str, size: int, resize: str = "crop") -> View:
    """Return the view of training images, which draws from torch's CPU generator.

    Args:
        augment: ``none`` for the plain view, or a name from :data:`AUGMENTATIONS`.
        size: Side of the square, in pixels.
        resize: How the plain view becomes square.

    Raises:
        UserError: If there is no such augmentation.
    """
    return plain_view(size, resize) if augment == "none" else _in_order(AUGMENTATIONS[augment](size))


def _in_order(transforms: Sequence[View]) -> View:
    view: View = transforms[0] if len(transforms) == 1 else v2.Compose(transforms)
    return view


class Views(Dataset[tuple[Tensor, int]]):
    """Views of images with their labels, asked for by ``(epoch, index)``, one or a batch at a time.

    Args:
        images: The images.
        view: What makes a square of each.
        seed: What the views hang on, with the epoch and the image; ``None`` for a view without chance.
        left_out: Called with what is said of an image that can't be decoded, which is then left out of its batch;
            ``None``: that is an error.
    """

    def __init__(
        self, images: LabeledImages, view: View, *, seed: int | None, left_out: Callable[[str], object] | None = None
    ) -> None:
        self.left_out = left_out
        self.images = images
        self.view = view
        self.seed = seed

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def __getitem__(self, which: tuple[int, int]) -> tuple[Tensor, int]:
        """Return the view ``(3, S, S)``, uint8, of image ``index`` in ``epoch``, and its label."""
        views, labels = self.__getitems__([which])
        return views[0], int(labels[0])

    def __getitems__(self, which: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return a batch: views ``(B, 3, S, S)``, uint8, a pixel's channels beside each other, and labels ``(B,)``."""
        loaded = [(epoch, index, pixels) for epoch, index in which if (pixels := self._load(index)) is not None]
        if not loaded:
            raise UserError("of a whole batch no image can be decoded")
        labels = torch.tensor([self.images.labels[index] for _, index, _ in loaded])
        if not isinstance(self.view, RandomResizedCrop) or self.seed is None:
            views = [self._seen(epoch, index, pixels).permute(1, 2, 0) for epoch, index, pixels in loaded]
            return torch.stack(views).permute(0, 3, 1, 2), labels
        batch = np.empty((len(loaded), self.view.size, self.view.size, 3), dtype=np.uint8)
        for (epoch, index, pixels), place in zip(loaded, batch, strict=True):
            crop_image(pixels, self.placement(epoch, index, *pixels.shape[1:]), out=place)
        return torch.from_numpy(batch).permute(0, 3, 1, 2), labels

    def placement(self, epoch: int, index: int, height: int, width: int) -> ResizedCrop:
        """Draw where the view of an image of that size lies, of views that are cut out and nothing more."""
        if not isinstance(self.view, RandomResizedCrop) or self.seed is None:
            raise TypeError("these views are not drawn, or more than cut out")
        seed = derive_seed(self.seed, "view", epoch, self.images.keys[index])
        return self.view.draw(height, width, generator=torch.Generator().manual_seed(seed))

    def _load(self, index: int) -> Tensor | None:
        try:
            return self.images.load(index)
        except UserError as error:
            if self.left_out is None:
                raise
            self.left_out(str(error))
            return None

    def _seen(self, epoch: int, index: int, pixels: Tensor) -> Tensor:
        if self.seed is None:
            return self.view(pixels)
        with seeded(self.seed, "view", epoch, self.images.keys[index]):
            return self.view(pixels)


class EpochSampler(Sampler[tuple[int, int]]):
    """Gives ``(epoch, index)``, so that the views need no state of the workers; shared out over processes.

    Args:
        indices: The images to give.
        seed: What the order hangs on, with the epoch; ``None`` keeps the order.
        rank: Number of this process.
        world_size: Number of processes.
        even: Give each process the same number, by giving the first ones again; a batch of one image needs it.
        period: After so many epochs they come again, with the same views in the same order; ``None``: never.
    """

    def __init__(
        self,
        indices: Sequence[int],
        *,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        even: bool = False,
        period: int | None = None,
    ) -> None:
        self.indices = indices
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.even = even
        self.period = period
        self.epoch = 0
        self._skipped = 0

    def skip(self, images: int) -> None:
        """Leave out the first images of the epoch that comes next: a resumed one gave them before."""
        self._skipped = images

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; Lightning calls it."""
        self.epoch = epoch if self.period is None else epoch % self.period

    def __len__(self) -> int:
        """Count the images of this process."""
        if self.even:
            return math.ceil(len(self.indices) / self.world_size)
        return len(range(self.rank, len(self.indices), self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over this process's part of the epoch."""
        order = list(self.indices)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
            order = [order[position] for position in torch.randperm(len(order), generator=generator).tolist()]
        if self.even and len(order) % self.world_size:
            missing = self.world_size - len(order) % self.world_size
            order += [order[position % len(order)] for position in range(missing)]
        skipped, self._skipped = self._skipped, 0
        return iter([(self.epoch, index) for index in order[self.rank :: self.world_size][skipped:]])
