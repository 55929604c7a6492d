"""Views that are cut out on the device: what crosses to it are images, or no more than where the views lie."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd.data.crops import RandomResizedCrop, crop_batch
from kd.data.decode_cache import CachedPixels
from kd.data.views import Views

_SHARE_OF_DEVICE = 0.3
"""Of its free memory; the networks and their gradients want the rest."""


class DeferredCrops(NamedTuple):
    """A batch of views that are yet to be cut out of their images, on the device.

    Args:
        pixels: The images one after the other, as :func:`crop_batch` takes them; ``None``: they are on the device.
        starts: Where the image of each view begins, ``(B,)``.
        sizes: Its height and width, ``(B, 2)``.
        matrices: The maps of the views' places to the images', ``(B, 2, 3)``.
        size: Side of the views, in pixels.
    """

    pixels: Tensor | None
    starts: Tensor
    sizes: Tensor
    matrices: Tensor
    size: int

    def crop(self, resident: Tensor | None) -> Tensor:
        """Cut them out, ``(B, 3, S, S)``, float32 in [0, 1]: of the images in the batch, or of those on the device."""
        pixels = resident if self.pixels is None else self.pixels
        if pixels is None:
            raise ValueError("the images are neither in the batch nor on the device")
        return crop_batch(pixels, self.starts, self.sizes, self.matrices, self.size)


class DeferredCropDataset(Dataset[tuple[DeferredCrops, Tensor]]):
    """Batches of views that are yet to be cut out, with their labels, asked for by ``(epoch, index)``.

    Args:
        views: The views.
        resident: Whether all images lie on the device, so that none crosses.

    Raises:
        ValueError: If more is done to the views than to cut them out.
    """

    def __init__(self, views: Views, *, resident: bool) -> None:
        if not can_defer_crops(views):
            raise ValueError("on the device views are cut out, and no more is done to them")
        self.views = views
        self.resident = resident

    def __len__(self) -> int:
        """Count the images."""
        return len(self.views)

    def __getitems__(self, which: Sequence[tuple[int, int]]) -> tuple[DeferredCrops, Tensor]:
        """Return a batch and its labels ``(B,)``."""
        images, view = self.views.images, self.views.view
        size = view.size if isinstance(view, RandomResizedCrop) else 0
        pixels = None
        if self.resident and isinstance(images.load, CachedPixels):
            sizes = [images.load.size_of(index) for _, index in which]
            starts = torch.tensor([int(images.load.starts[index]) for _, index in which])
        else:
            loaded = [images.load(index).permute(1, 2, 0) for _, index in which]
            sizes = [(int(one.shape[0]), int(one.shape[1])) for one in loaded]
            pixels = torch.cat([one.flatten() for one in loaded])
            starts = torch.tensor([0, *(one.numel() for one in loaded)]).cumsum(0)[:-1]
        matrices = [
            self.views.placement(epoch, index, *image_size).matrix(*image_size, size)
            for (epoch, index), image_size in zip(which, sizes, strict=True)
        ]
        batch = DeferredCrops(
            pixels, starts, torch.tensor(sizes), torch.tensor(np.stack(matrices), dtype=torch.float32), size
        )
        return batch, torch.tensor([images.labels[index] for _, index in which])


def can_defer_crops(views: Views) -> bool:
    """Say whether views are drawn and cut out of images of a size that may cross, and no more is done to them."""
    small = views.images.cached_side is not None or not views.images.files
    return isinstance(views.view, RandomResizedCrop) and views.seed is not None and small


def resident_pixels(views: Views, device: torch.device) -> Tensor | None:
    """Return all images of a store on a GPU, where they fit; they are read once for all runs of a process."""
    store = views.images.load
    if device.type != "cuda" or not isinstance(store, CachedPixels):
        return None
    return _kept_on(store.path, device)


@lru_cache(maxsize=1)
def _kept_on(path: Path, device: torch.device) -> Tensor | None:
    free, _ = torch.cuda.mem_get_info(device)
    if path.stat().st_size > _SHARE_OF_DEVICE * free:
        return None
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8)).to(device)
