"""Crops that are applied on the device: loaders send whole images, or only the parameters of the crops."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd.data.crops import crop_batch
from kd.data.decode_cache import CachedPixels
from kd.data.views import Views

# Maximum fraction of the device's free memory for resident images; the networks need the rest.
_MEMORY_FRACTION = 0.3


class DeferredCrops(NamedTuple):
    """A batch of views to crop, as arguments of `crop_batch`; without pixels if these are resident on the device."""

    pixels: Tensor | None
    starts: Tensor
    sizes: Tensor
    matrices: Tensor
    size: int

    def crop(self, resident: Tensor | None) -> Tensor:
        """Return the views ``(B, 3, S, S)``, float32 in [0, 1], of the batch's own images or the resident ones."""
        pixels = resident if self.pixels is None else self.pixels
        if pixels is None:
            raise ValueError("the images are neither in the batch nor on the device")
        return crop_batch(pixels, self.starts, self.sizes, self.matrices, self.size)


@dataclass(eq=False)
class DeferredCropDataset(Dataset[tuple[DeferredCrops, Tensor]]):
    """Batches of deferred crops and labels, indexed by a list of ``(epoch, index)``; without ``resident`` images."""

    views: Views
    resident: bool

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.views)

    def __getitems__(self, batch: Sequence[tuple[int, int]]) -> tuple[DeferredCrops, Tensor]:
        """Return the deferred crops and the labels ``(B,)`` of a batch."""
        images, indices = self.views.images, [index for _, index in batch]
        pixels = None
        if self.resident and isinstance(images.load, CachedPixels):
            sizes, starts = images.load.sizes[indices].tolist(), torch.from_numpy(images.load.starts[indices])
        else:
            loaded = [images.load(index).permute(1, 2, 0) for index in indices]
            sizes = [list(image.shape[:2]) for image in loaded]
            pixels = torch.cat([image.flatten() for image in loaded])
            starts = torch.tensor([0, *(image.numel() for image in loaded)]).cumsum(0)[:-1]
        side = self.views.crop_size
        crops = [self.views.draw_crop(*position, *size) for position, size in zip(batch, sizes, strict=True)]
        matrices = np.stack([crop.matrix(h, w, side) for crop, (h, w) in zip(crops, sizes, strict=True)])
        labels = images.targets(indices)
        return DeferredCrops(pixels, starts, torch.tensor(sizes), torch.from_numpy(matrices).float(), side), labels


def can_defer_crops(views: Views) -> bool:
    """Return whether views are random resized crops alone, of images small enough to send to the device."""
    return views.crop_size > 0 and (views.images.cached_side is not None or not views.images.files)


def resident_pixels(views: Views, device: torch.device) -> Tensor | None:
    """Return all images of a decode cache on a GPU, if they fit; they are shared by all runs of a process."""
    cache = views.images.load
    return _load_to(cache.path, device) if device.type == "cuda" and isinstance(cache, CachedPixels) else None


@lru_cache(maxsize=1)
def _load_to(path: Path, device: torch.device) -> Tensor | None:
    free, _ = torch.cuda.mem_get_info(device)
    if path.stat().st_size > _MEMORY_FRACTION * free:
        return None
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8)).to(device)
