"""Views: square versions of images, pure functions of (seed, epoch, image)."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from kd.data.crops import RandomResizedCrop, ResizedCrop, crop_image
from kd.data.images import Label, LabeledImages
from kd.errors import UserError
from kd.pixels import plain_side
from kd.randomness import derive_seed, seeded
from kd.registry import Registry, call_own_code, check_hyperparameters, is_own_code, load_own_code, parse_choice

View = Callable[[Tensor], Tensor]

_REPEATED = 1 << 32
# The mean of ImageNet's images.
_GRAY = [124.0, 116.0, 104.0]
FIXED = ("none", "flip")
"""Augmentations with at most two views of each image: the plain view, and its mirror image."""

AUGMENTATIONS: Registry[Callable[..., list[View]]] = Registry("augmentation")
"""Augmentations by name: functions of the image size in pixels, and of options, that return the transforms, uint8 to
uint8, in order."""


@AUGMENTATIONS.register("pad_crop")
def pad_crop(size: int, padding: int | None = None) -> list[View]:
    """Padding by zeros (an eighth of the side), then a random crop and flip; He et al. (2015), section 4.2."""
    whole = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    margin = size // 8 if padding is None else padding
    return [*whole, v2.RandomCrop(size, padding=margin), v2.RandomHorizontalFlip()]


@AUGMENTATIONS.register("crop")
def crop(size: int) -> list[View]:
    """Random resized crop (8 to 100 % of the area, 3:4 to 4:3) and flip; Szegedy et al. (2014), section 6."""
    return [RandomResizedCrop(size)]


@AUGMENTATIONS.register("rotate")
def rotate(size: int, degrees: float = 30.0) -> list[View]:
    """Random rotation by up to 30 degrees, then ``crop``, in one resampling."""
    return [RandomResizedCrop(size, degrees=degrees)]


@AUGMENTATIONS.register("trivial")
def trivial(size: int) -> list[View]:
    """``crop``, then TrivialAugment: one random operation; Müller & Hutter (2021), https://arxiv.org/abs/2103.10158."""
    return [*crop(size), v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)]


@AUGMENTATIONS.register("rand")
def rand(size: int, num_ops: int = 2, magnitude: int = 9) -> list[View]:
    """``crop``, then RandAugment: two operations of magnitude 9; Cubuk et al. (2019), https://arxiv.org/abs/1909.13719."""
    return [*crop(size), v2.RandAugment(num_ops, magnitude, interpolation=v2.InterpolationMode.BILINEAR)]


AUGMENTATIONS.register("randaugment")(rand)


class OwnView:
    """A transform of the user's, whose draws from Python's and NumPy's generators are seeded by those of torch.

    Args:
        transform: Maps an image ``(3, H, W)``, uint8, to a view ``(3, S, S)``, uint8.
        name: How it is written, for messages.
        size: Side S of the views, in pixels.
    """

    def __init__(self, transform: View, name: str, size: int) -> None:
        self._transform, self._name, self._size = transform, name, size

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the view of an image; a ``UserError`` if the transform fails, or returns something else."""
        seed, before = int(torch.randint(2**31, ())), (random.getstate(), np.random.get_state())  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the generator that transforms draw from)
        try:
            view = call_own_code(self._name, self._transform, pixels)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
        expected = (3, self._size, self._size)
        if not isinstance(view, Tensor) or tuple(view.shape) != expected or view.dtype != torch.uint8:
            is_tensor = isinstance(view, Tensor)
            got = f"{view.dtype} of shape {tuple(view.shape)}" if is_tensor else f"a {type(view).__name__}"
            raise UserError(f"{self._name!r}: a view must be a uint8 tensor of shape {expected}, not {got}")
        return view


def short_side(size: int, augment: str = "none") -> int:
    """Return the short side, in pixels, to which images may be resized before views are cropped out of them.

    A plain view shows 7/8 of the short side. A random crop shows as little as 8 % of the area, which would be blurred
    by a smaller short side: students trained on blurred views are less accurate.
    """
    return plain_side(size) if augment in FIXED else 2 * size


def plain_view(size: int, resize: str = "crop") -> View:
    """Return the deterministic view of ``size`` pixels, used for validation.

    ``crop`` resizes the short side to 8/7 of ``size`` and crops the center; ``squash`` ignores the aspect ratio.
    """
    view: View = v2.Compose([v2.Resize(plain_side(size), antialias=True), v2.CenterCrop(size)])
    if resize == "squash":
        view = v2.Resize((size, size), antialias=True)
    return view


def training_view(augment: str, size: int, resize: str = "crop", *, erasing: float = 0.0) -> View:
    """Return the view of training images, which draws from torch's global CPU generator.

    Args:
        augment: ``none``, the plain view; ``flip``, which mirrors it with a probability of one half; a name in
            `AUGMENTATIONS`, also with options, ``rand(magnitude=7)``; or ``path/to/file.py:function``, called with the
            size, which returns a transform as of :class:`OwnView`.
        size: Side of the views, in pixels.
        resize: As of :func:`plain_view`.
        erasing: Probability of erasing a random rectangle, which becomes gray.

    Raises:
        UserError: If there is no such augmentation, or it doesn't take the options; or if one of the user's fails.

    Source: Zhong et al. (2017), https://arxiv.org/abs/1708.04896 (random erasing)
    """
    transforms = _transforms(augment, size, resize)
    if erasing:
        transforms = [*transforms, v2.RandomErasing(erasing, value=_GRAY)]
    return v2.Compose(transforms) if len(transforms) > 1 else transforms[0]


def _transforms(augment: str, size: int, resize: str) -> list[View]:
    if augment in FIXED:
        plain = plain_view(size, resize)
        return [plain] if augment == "none" else [plain, v2.RandomHorizontalFlip()]
    try:
        name, options = parse_choice(augment)
        if is_own_code(name):
            return [_own_view(augment, size, name, options)]
        build = AUGMENTATIONS[name]
        check_hyperparameters(build, options, choice=augment)
        return build(size, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"--augment {augment}: {error}") from None
    except UserError as error:
        raise UserError(f"--augment {augment}: {error}") from error.__cause__


def _own_view(augment: str, size: int, name: str, options: Mapping[str, Any]) -> OwnView:
    """Build the user's transform, and try it on images that are larger and smaller than the view."""
    own = OwnView(call_own_code(augment, load_own_code(name), size, **options), augment, size)
    for height, width in ((size + 8, 2 * size), (max(1, size // 2), size)):
        with seeded("trial"):
            own(torch.zeros(3, height, width, dtype=torch.uint8))
    return own


@dataclass(eq=False)
class Views(Dataset[tuple[Tensor, Label]]):
    """Views of images with their labels, indexed by ``(epoch, index)``.

    Views are drawn from the seed, the epoch and the image key; ``None`` is for a deterministic view. ``left_out`` is as
    of :class:`kd.data.Batches`.
    """

    images: LabeledImages
    view: View
    _: KW_ONLY
    seed: int | None
    left_out: Callable[[str], object] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, position: tuple[int, int]) -> tuple[Tensor, Label]:
        """Return the view ``(3, S, S)``, uint8, and the label for one ``(epoch, index)``."""
        views, _ = self.__getitems__([position])
        return views[0], self.images.labels[position[1]]

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return a batch: views ``(B, 3, S, S)``, uint8, in channels-last memory layout, and their targets."""
        loaded = [(epoch, index, pixels) for epoch, index in positions if (pixels := self._load(index)) is not None]
        if not loaded:
            raise UserError("no image of a whole batch can be decoded")
        labels = self.images.targets([index for _, index, _ in loaded])
        if not self.crop_size:
            views = [self._apply_view(epoch, index, pixels).permute(1, 2, 0) for epoch, index, pixels in loaded]
            return torch.stack(views).permute(0, 3, 1, 2), labels
        # The same in 15 % less time: crops are written into the batch, and drawn from generators of their own.
        batch = np.empty((len(loaded), self.crop_size, self.crop_size, 3), dtype=np.uint8)
        for (epoch, index, pixels), out in zip(loaded, batch, strict=True):
            crop_image(pixels, self.draw_crop(epoch, index, *pixels.shape[1:]), out=out)
        return torch.from_numpy(batch).permute(0, 3, 1, 2), labels

    @property
    def crop_size(self) -> int:
        """Side of the views, in pixels, if they are random resized crops alone, else 0."""
        return self.view.size if isinstance(self.view, RandomResizedCrop) and self.seed is not None else 0

    def draw_crop(self, epoch: int, index: int, height: int, width: int) -> ResizedCrop:
        """Draw the crop of an image of ``height`` x ``width`` pixels, for views that are random resized crops."""
        if not isinstance(self.view, RandomResizedCrop) or self.seed is None:
            raise TypeError("these views are not random resized crops")
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

    def _apply_view(self, epoch: int, index: int, pixels: Tensor) -> Tensor:
        if self.seed is None:
            return self.view(pixels)
        with seeded(self.seed, "view", epoch, self.images.keys[index]):
            return self.view(pixels)


@dataclass(eq=False)
class EpochSampler(Sampler[tuple[int, int]]):
    """Samples ``(epoch, index)``, so that views need no state in the workers; distributed over processes.

    Args:
        indices: The images, or batches, to sample.
        seed: Random seed of the order, together with the epoch; ``None`` keeps the order of ``indices``.
        rank, world_size: Rank of this process, and number of processes.
        weights: Relative frequency of each of the ``indices``, which are then drawn with replacement; ``None``: each
            once. An image that is drawn again in an epoch has another view.
        even: Whether the first images are repeated, so that each process samples the same number.
        period: Number of epochs after which views and order repeat; ``None``: never.
    """

    indices: Sequence[int]
    _: KW_ONLY
    seed: int | None
    rank: int = 0
    world_size: int = 1
    weights: Sequence[float] | None = None
    even: bool = False
    period: int | None = None
    epoch: int = field(default=0, init=False)
    _skipped: int = field(default=0, init=False)

    def skip(self, positions: int) -> None:
        """Skip the first positions of the next epoch, which an interrupted run has already used."""
        self._skipped = positions

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch; called by Lightning."""
        self.epoch = epoch if self.period is None else epoch % self.period

    def __len__(self) -> int:
        """Return the number of positions of this process."""
        count = len(self.indices)
        return math.ceil(count / self.world_size) if self.even else len(range(self.rank, count, self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over this process's part of the epoch."""
        # A generator skips only when it is used: a loader with workers creates an iterator that it discards.
        order, times = list(self.indices), list[int]()
        if self.seed is not None and self.weights is not None:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "weighted order", self.epoch))
            drawn = torch.multinomial(torch.tensor(self.weights), len(order), replacement=True, generator=generator)
            order = [order[position] for position in drawn.tolist()]
            seen = Counter[int]()
            for index in order:
                times.append(seen[index])
                seen[index] += 1
        elif self.seed is not None:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
            order = [order[position] for position in torch.randperm(len(order), generator=generator).tolist()]
        if self.even:
            missing = -len(order) % self.world_size
            order, times = ([*values, *islice(cycle(values), missing)] for values in (order, times))
        skipped, self._skipped = self._skipped, 0
        # The views of an image that is drawn again are those of an epoch that no training reaches.
        epochs = [self.epoch + _REPEATED * number for number in times] if times else [self.epoch] * len(order)
        yield from list(zip(epochs, order, strict=True))[self.rank :: self.world_size][skipped:]
