import numpy as np
import pytest
import torch

from kd.data import BROKEN, FileFinding, LabeledImages, channel_statistics, drop_broken, plain_view
from kd.data.images import keep_fraction


def labeled(labels: list[int], pixels: torch.Tensor | None = None) -> LabeledImages:
    names = tuple(f"class {index}" for index in range(max(labels) + 1))
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8) if pixels is None else pixels
    return LabeledImages(names, labels, [str(index) for index in range(len(labels))], lambda index: images[index])


@pytest.mark.parametrize(("fraction", "kept"), [(1.0, [10, 20]), (0.5, [5, 10]), (0.25, [2, 5]), (0.001, [1, 1])])
def test_a_fraction_is_stratified_by_class(fraction: float, kept: list[int]) -> None:
    images = labeled([0] * 10 + [1] * 20)
    indices = keep_fraction(images, fraction, seed=0)
    assert np.bincount([images.labels[index] for index in indices]).tolist() == kept
    assert indices == sorted(set(indices))


def test_a_smaller_fraction_is_a_subset_of_a_larger_one_and_depends_on_the_seed() -> None:
    images = labeled([0] * 50 + [1] * 50)
    small, large, other = (keep_fraction(images, part, seed=seed) for part, seed in ((0.2, 0), (0.6, 0), (0.2, 1)))
    assert set(small) < set(large)
    assert small == keep_fraction(images, 0.2, seed=0) != other


def test_images_without_files_are_never_dropped_as_broken() -> None:
    images = labeled([0, 1])
    assert drop_broken(images, [FileFinding(BROKEN, "elsewhere.png", "")]) is images


def test_channel_statistics_equal_numpys() -> None:
    pixels = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(labeled([0, 1] * 10, pixels), plain_view(4, "squash"))
    expected = pixels.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, expected.mean(axis=(0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(std, expected.std(axis=(0, 2, 3), ddof=1), atol=1e-4)


def test_the_standard_deviation_of_a_constant_channel_is_clamped() -> None:
    assert channel_statistics(labeled([0, 1]), plain_view(4))[1] == (0.01, 0.01, 0.01)
