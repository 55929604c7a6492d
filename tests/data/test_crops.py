"""Random resized crops, against torchvision's transforms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2f

from kd.data import RandomResizedCrop, crop_image
from kd.data.crops import ResizedCrop, crop_batch

HEIGHT, WIDTH = 90, 120
CROPS = [
    ResizedCrop(0, 0, 90, 120),
    ResizedCrop(10, 20, 50, 40),
    ResizedCrop(10, 20, 50, 40, flipped=True),
    ResizedCrop(15, 25, 60, 70, angle=20.0),
    ResizedCrop(15, 25, 60, 70, angle=-20.0, flipped=True),
]


@pytest.fixture(scope="module")
def image() -> Tensor:
    coarse = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
    return (fine[0] * 255).to(torch.uint8)


def crop_by_torchvision(image: Tensor, crop: ResizedCrop, size: int) -> Tensor:
    rotated = v2f.rotate(image, crop.angle, interpolation=v2.InterpolationMode.BILINEAR)
    box = [crop.top, crop.left, crop.height, crop.width]
    view: Tensor = v2f.resized_crop(rotated, *box, size=[size, size], antialias=True)
    return (view.flip(-1) if crop.flipped else view).float()


def crop_on_cpu(image: Tensor, crop: ResizedCrop, size: int) -> Tensor:
    view = np.empty((size, size, 3), dtype=np.uint8)
    crop_image(image, crop, out=view)
    return torch.from_numpy(view).permute(2, 0, 1).float()


def crop_on_device(image: Tensor, crop: ResizedCrop, size: int) -> Tensor:
    # Preceded by the pixels of another image.
    pixels = torch.cat([torch.zeros(30, dtype=torch.uint8), image.permute(1, 2, 0).flatten()])
    matrix = torch.tensor(crop.matrix(HEIGHT, WIDTH, size), dtype=torch.float32)
    return 255 * crop_batch(pixels, torch.tensor([30]), torch.tensor([[HEIGHT, WIDTH]]), matrix[None], size)[0]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("size", [64, 112])
def test_a_crop_equals_torchvisions(image: Tensor, crop: ResizedCrop, size: int) -> None:
    expected = crop_by_torchvision(image, crop, size)
    # Without the border, where the interpolations differ in their use of pixels outside the box and of black corners.
    inside = (..., slice(8, -8), slice(8, -8))
    for view in (crop_on_cpu(image, crop, size), crop_on_device(image, crop, size)):
        difference = (view - expected).abs()
        assert difference.mean() < 1.5
        if crop.angle == 0:
            assert difference[inside].max() < 8


@pytest.mark.parametrize("angle", [0.0, 25.0])
def test_downscaling_does_not_alias(angle: float) -> None:
    # Stripes one pixel wide, of which sampling without averaging would keep some.
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    image[:, :, ::2] = 200
    view = crop_on_cpu(image, ResizedCrop(100, 100, 200, 200, angle=angle), 20)
    assert (view - 100).abs().max() <= 30


def test_the_corners_of_a_rotated_image_are_black(image: Tensor) -> None:
    corner = ResizedCrop(0, 0, HEIGHT, WIDTH, angle=45.0)
    for view in (crop_on_cpu(image, corner, 60), crop_on_device(image, corner, 60)):
        assert view[:, 0, 0].max() == 0
        assert view[:, 30, 30].min() > 0


def test_a_matrix_maps_the_corners_of_the_view_to_those_of_the_box() -> None:
    box = ResizedCrop(10, 20, 50, 40)
    corners = np.array([[0, 64], [0, 64], [1, 1]], dtype=float)
    np.testing.assert_allclose(box.matrix(HEIGHT, WIDTH, 64) @ corners, [[20, 60], [10, 60]])
    mirrored = ResizedCrop(10, 20, 50, 40, flipped=True)
    np.testing.assert_allclose(mirrored.matrix(HEIGHT, WIDTH, 64) @ corners, [[60, 20], [10, 60]])
    # A rotation by 90 degrees counter-clockwise maps the upper right corner of a square image to the upper left.
    rotated = ResizedCrop(0, 0, 90, 90, angle=90.0)
    np.testing.assert_allclose(rotated.matrix(90, 90, 64) @ [0, 0, 1], [90, 0], atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (224, 224), (20, 900), (900, 20), (1, 1)])
def test_crops_lie_within_the_image(height: int, width: int) -> None:
    transform = RandomResizedCrop(224, degrees=30.0)
    for seed in range(200):
        crop = transform.draw(height, width, generator=torch.Generator().manual_seed(seed))
        assert 0 <= crop.top < crop.top + crop.height <= height
        assert 0 <= crop.left < crop.left + crop.width <= width
        assert abs(crop.angle) <= 30


def test_crops_are_distributed_as_torchvisions() -> None:
    transform = RandomResizedCrop(224, degrees=30.0)
    generator = torch.Generator().manual_seed(0)
    torchvisions = v2.RandomResizedCrop(224)
    pixels = torch.empty(3, 300, 400)
    ours, theirs = [], []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(4000):
            crop = transform.draw(300, 400, generator=generator)
            ratio = math.log(crop.width / crop.height)
            ours.append((crop.height * crop.width, ratio, crop.top, crop.left, crop.flipped, crop.angle))
            box = torchvisions.make_params([pixels])
            ratio = math.log(box["width"] / box["height"])
            theirs.append((box["height"] * box["width"], ratio, box["top"], box["left"]))
    drawn, expected = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    quantiles = [0.1, 0.3, 0.5, 0.7, 0.9]
    for column, tolerance in enumerate((4000, 0.03, 6, 8)):
        np.testing.assert_allclose(
            np.quantile(drawn[:, column], quantiles), np.quantile(expected[:, column], quantiles), atol=tolerance
        )
    assert drawn[:, 4].mean() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_allclose(np.quantile(drawn[:, 5], quantiles), [-24, -12, 0, 12, 24], atol=2)
