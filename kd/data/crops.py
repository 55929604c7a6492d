"""Where in an image a view lies, and two ways to cut it out: one image on the CPU, a whole batch on the device."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The loader's processes are what shares the cores out; threads below them would compete for the same ones.
cv2.setNumThreads(0)

_TRIES = 10
_MUCH_SMALLER = 2.0
"""From this factor on, a point between two pixels would pass over others; averages of areas take five times as long."""


@dataclass(frozen=True)
class ResizedCrop:
    """A box in an image that was rotated about its center, and whether it is seen from behind.

    Args:
        top: First row of the box, in pixels.
        left: First column.
        height: Rows.
        width: Columns.
        angle: Degrees that the image is rotated by before, counter-clockwise; its corners are black then.
        flipped: Whether left and right change places.
    """

    top: int
    left: int
    height: int
    width: int
    angle: float = 0.0
    flipped: bool = False

    def matrix(self, height: int, width: int, size: int) -> NDArray[np.float64]:
        """Return the affine map ``(2, 3)`` from places ``(x, y, 1)`` in the view to those in the image.

        A place is measured in pixels from the upper left corner; the first pixel's center lies at 0.5.

        Args:
            height: Of the image.
            width: Of the image.
            size: Side of the view.
        """
        mirror = -1 if self.flipped else 1
        x_step, y_step = mirror * self.width / size, self.height / size
        x_first = self.left + (self.width if self.flipped else 0) - width / 2
        y_first = self.top - height / 2
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        turned = np.array([[cos, -sin], [sin, cos]])
        box = np.array([[x_step, 0.0, x_first], [0.0, y_step, y_first]])
        matrix: NDArray[np.float64] = turned @ box
        matrix[:, 2] += (width / 2, height / 2)
        return matrix


@dataclass(frozen=True)
class RandomResizedCrop:
    """Draws views: a rotation, a box of random area and proportions, and a flip of half of them.

    The distribution is that of torchvision's ``RandomRotation``, ``RandomResizedCrop`` and ``RandomHorizontalFlip``;
    their draws, which take longer than the cutting, are replaced by a single one.

    Args:
        size: Side of the views, in pixels.
        degrees: Largest rotation.
        area: Least and largest part of the image's area.
        proportions: Least and largest ratio of width to height.

    Source: Szegedy et al. (2014), section 6, https://arxiv.org/abs/1409.4842
    """

    size: int
    degrees: float = 0.0
    area: tuple[float, float] = (0.08, 1.0)
    proportions: tuple[float, float] = (3 / 4, 4 / 3)

    def draw(self, height: int, width: int, *, generator: torch.Generator | None = None) -> ResizedCrop:
        """Draw one for an image of a height and a width in pixels, from a generator or torch's own."""
        turn, flip, down, across, *tries = torch.rand(4 + 2 * _TRIES, generator=generator).tolist()
        angle, flipped = self.degrees * (2 * turn - 1), flip < 1 / 2
        for area, proportions in zip(tries[::2], tries[1::2], strict=True):
            surface = height * width * _between(self.area, area)
            ratio = math.exp(_between((math.log(self.proportions[0]), math.log(self.proportions[1])), proportions))
            columns, rows = round(math.sqrt(surface * ratio)), round(math.sqrt(surface / ratio))
            if 0 < columns <= width and 0 < rows <= height:
                top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
                return ResizedCrop(top, left, rows, columns, angle, flipped)
        # None fits into an image that is very long: the largest in its middle that has the proportions.
        ratio = min(max(width / height, self.proportions[0]), self.proportions[1])
        columns, rows = min(width, round(height * ratio)), min(height, round(width / ratio))
        return ResizedCrop((height - rows) // 2, (width - columns) // 2, max(1, rows), max(1, columns), angle, flipped)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Draw a view ``(3, S, S)`` of an image ``(3, H, W)``, uint8."""
        view = np.empty((self.size, self.size, 3), dtype=np.uint8)
        crop_image(pixels, self.draw(*pixels.shape[1:]), out=view)
        return torch.from_numpy(view).permute(2, 0, 1)


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


def crop_image(pixels: Tensor, placement: ResizedCrop, *, out: NDArray[np.uint8]) -> None:
    """Cut a view out of one image, on the CPU, in one sampling.

    Points between pixels are interpolated linearly; where the box is twice as large as the view, areas are averaged.

    Args:
        pixels: ``(3, H, W)``, uint8.
        placement: Where it lies.
        out: Where to write it: ``(S, S, 3)``, in one piece.
    """
    size = len(out)
    image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    height, width = image.shape[:2]
    if placement.angle:
        scale = min(placement.height, placement.width) / size
        matrix = placement.matrix(height, width, size)
        if scale >= _MUCH_SMALLER:
            smaller = (max(1, round(width / scale)), max(1, round(height / scale)))
            image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
            matrix = np.diag([smaller[0] / width, smaller[1] / height]) @ matrix
        # OpenCV counts from the first pixel's center.
        matrix[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5
        cv2.warpAffine(image, matrix, (size, size), dst=out, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    else:
        bottom, right = placement.top + placement.height, placement.left + placement.width
        box = image[placement.top : bottom, placement.left : right]
        shrinks = min(box.shape[:2]) >= _MUCH_SMALLER * size
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        if placement.flipped:
            cv2.flip(cv2.resize(box, (size, size), interpolation=how), 1, dst=out)
        else:
            cv2.resize(box, (size, size), dst=out, interpolation=how)


def crop_batch(pixels: Tensor, starts: Tensor, sizes: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Cut one view out of each of many images, on the device where they lie, in one sampling for all.

    Points between pixels are interpolated linearly; what lies outside of an image is black.

    Args:
        pixels: All images one after the other, each row by row with the channels of a pixel beside each other: uint8.
        starts: Where the image of each view begins in it, ``(B,)``, int64.
        sizes: Its height and width, ``(B, 2)``, int64.
        matrices: Of :meth:`ResizedCrop.matrix`, ``(B, 2, 3)``, float32.
        size: Side S of the views, in pixels.

    Returns:
        ``(B, 3, S, S)``, float32 in [0, 1], the channels of a pixel beside each other in memory.
    """
    centers = torch.arange(size, device=pixels.device) + 0.5
    towards_x, towards_y, first = matrices[:, :, :, None, None].unbind(2)
    x, y = (towards_x * centers + towards_y * centers[:, None] + first).unbind(1)
    height, width = sizes[:, 0, None, None], sizes[:, 1, None, None]
    inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    x, y = (x - 0.5).clamp(min=0).minimum(width - 1), (y - 0.5).clamp(min=0).minimum(height - 1)
    left, top = x.long(), y.long()
    right, below = (left + 1).minimum(width - 1), (top + 1).minimum(height - 1)
    channels = torch.arange(3, device=pixels.device)

    def at(row: Tensor, column: Tensor) -> Tensor:
        where = starts[:, None, None] + 3 * (row * width + column)
        return pixels[where[..., None] + channels].float()

    x_share, y_share = (x - left)[..., None], (y - top)[..., None]
    upper = torch.lerp(at(top, left), at(top, right), x_share)
    lower = torch.lerp(at(below, left), at(below, right), x_share)
    views = torch.lerp(upper, lower, y_share) * (inside[..., None] / 255)
    return views.permute(0, 3, 1, 2)
