"""Random resized crops: drawn as parameters, then applied to one image on the CPU or to a batch on any device."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The loader's processes share the cores; OpenCV's threads would compete with them.
cv2.setNumThreads(0)

_TRIES = 10
# Smallest fraction of the area, and largest ratio of width to height or of height to width.
_MIN_AREA, _MAX_RATIO = 0.08, 4 / 3
_AREA_SCALE = 2.0
"""From this factor on, linear interpolation would skip pixels; area averaging takes five times as long."""


@dataclass(frozen=True)
class ResizedCrop:
    """A box in pixels, in an image first rotated about its center by ``angle`` degrees counter-clockwise."""

    top: int
    left: int
    height: int
    width: int
    angle: float = 0.0
    flipped: bool = False

    def matrix(self, height: int, width: int, size: int) -> NDArray[np.float64]:
        """Return the affine map ``(2, 3)`` from positions ``(x, y, 1)`` in a view to those in an image of that size.

        Positions are in pixels from the upper left corner; the center of the first pixel is at 0.5.
        """
        x_scale, x_start = (-self.width, self.left + self.width) if self.flipped else (self.width, self.left)
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        rotation = np.array([[cos, -sin], [sin, cos]])
        box = np.array([[x_scale / size, 0.0, x_start - width / 2], [0.0, self.height / size, self.top - height / 2]])
        matrix: NDArray[np.float64] = rotation @ box
        matrix[:, 2] += (width / 2, height / 2)
        return matrix


@dataclass(frozen=True)
class RandomResizedCrop:
    """Random rotation, crop of random area and aspect ratio, and horizontal flip of one in two images.

    The distribution is that of torchvision's ``RandomRotation``, ``RandomResizedCrop`` and ``RandomHorizontalFlip``,
    but all numbers are drawn at once, since their separate draws take longer than the crop.

    Args:
        size: Side of the views, in pixels.
        degrees: Maximum rotation, in degrees.

    Source: Szegedy et al. (2014), section 6, https://arxiv.org/abs/1409.4842
    """

    size: int
    degrees: float = 0.0

    def draw(self, height: int, width: int, *, generator: torch.Generator | None = None) -> ResizedCrop:
        """Draw a crop of an image of ``height`` x ``width`` pixels, from a generator or torch's global one."""
        turn, flip, down, across, *tries = torch.rand(4 + 2 * _TRIES, generator=generator).tolist()
        angle, flipped = self.degrees * (2 * turn - 1), flip < 1 / 2
        for area_draw, ratio_draw in zip(tries[::2], tries[1::2], strict=True):
            area = height * width * (_MIN_AREA + (1 - _MIN_AREA) * area_draw)
            ratio = _MAX_RATIO ** (2 * ratio_draw - 1)
            columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < columns <= width and 0 < rows <= height:
                top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
                return ResizedCrop(top, left, rows, columns, angle, flipped)
        # None fits into a very elongated image: take the largest central crop within the aspect ratios.
        ratio = min(max(width / height, 1 / _MAX_RATIO), _MAX_RATIO)
        columns, rows = min(width, round(height * ratio)), min(height, round(width / ratio))
        return ResizedCrop((height - rows) // 2, (width - columns) // 2, max(1, rows), max(1, columns), angle, flipped)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return a random view ``(3, S, S)`` of an image ``(3, H, W)``, uint8."""
        view = np.empty((self.size, self.size, 3), dtype=np.uint8)
        crop_image(pixels, self.draw(*pixels.shape[1:]), out=view)
        return torch.from_numpy(view).permute(2, 0, 1)


def crop_image(pixels: Tensor, crop: ResizedCrop, *, out: NDArray[np.uint8]) -> None:
    """Crop, resize, rotate and flip one image ``(3, H, W)`` on the CPU, in one resampling, into ``out``, ``(S, S, 3)``.

    Interpolates linearly, or averages areas where the box is at least twice as large as the view.
    """
    size = len(out)
    image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    height, width = image.shape[:2]
    if crop.angle:
        scale = min(crop.height, crop.width) / size
        matrix = crop.matrix(height, width, size)
        if scale >= _AREA_SCALE:
            smaller = (max(1, round(width / scale)), max(1, round(height / scale)))
            image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
            matrix = np.diag([smaller[0] / width, smaller[1] / height]) @ matrix
        # OpenCV's origin is the center of the first pixel.
        matrix[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5
        cv2.warpAffine(image, matrix, (size, size), dst=out, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        return
    box = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    interpolation = cv2.INTER_AREA if min(box.shape[:2]) >= _AREA_SCALE * size else cv2.INTER_LINEAR
    if crop.flipped:
        cv2.flip(cv2.resize(box, (size, size), interpolation=interpolation), 1, dst=out)
    else:
        cv2.resize(box, (size, size), dst=out, interpolation=interpolation)


def crop_batch(pixels: Tensor, starts: Tensor, sizes: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Crop views out of images on their device, in one linear resampling; positions outside an image are black.

    Args:
        pixels: All images one after the other, each as ``(H, W, 3)``, flattened, uint8.
        starts: Offset of each view's image in ``pixels``, ``(B,)``, int64.
        sizes: Height and width of each view's image, ``(B, 2)``, int64.
        matrices: From `ResizedCrop.matrix`, ``(B, 2, 3)``, float32.
        size: Side S of the views, in pixels.

    Shape:
        - returns: ``(B, 3, S, S)``, float32 in [0, 1], in channels-last memory layout.
    """
    centers = torch.arange(size, device=pixels.device) + 0.5
    towards_x, towards_y, origin = matrices[:, :, :, None, None].unbind(2)
    x, y = (towards_x * centers + towards_y * centers[:, None] + origin).unbind(1)
    height, width = sizes[:, 0, None, None], sizes[:, 1, None, None]
    inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    x, y = (x - 0.5).clamp(min=0).minimum(width - 1), (y - 0.5).clamp(min=0).minimum(height - 1)
    left, top = x.long(), y.long()
    right, bottom = (left + 1).minimum(width - 1), (top + 1).minimum(height - 1)
    channels = torch.arange(3, device=pixels.device)

    def at(row: Tensor, column: Tensor) -> Tensor:
        offsets = starts[:, None, None] + 3 * (row * width + column)
        return pixels[offsets[..., None] + channels].float()

    x_weight, y_weight = (x - left)[..., None], (y - top)[..., None]
    upper = torch.lerp(at(top, left), at(top, right), x_weight)
    lower = torch.lerp(at(bottom, left), at(bottom, right), x_weight)
    views = torch.lerp(upper, lower, y_weight) * (inside[..., None] / 255)
    return views.permute(0, 3, 1, 2)
