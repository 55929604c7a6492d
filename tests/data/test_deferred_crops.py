"""Views cropped on the device equal those cropped on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.data import ImageData, LabeledImages, Splits, cache_decoded, read_folder
from kd.data.deferred_crops import DeferredCropDataset, DeferredCrops, can_defer_crops
from kd.data.images import concatenate
from tests.conftest import write_images


@pytest.fixture
def cached(tmp_path: Path) -> LabeledImages:
    write_images(tmp_path / "images", [(40, 32), (32, 44), (36, 36)], coarse=(6, 5))
    return cache_decoded(read_folder(tmp_path / "images"), 32, tmp_path / "stores")


def batches(images: LabeledImages, augment: str, *, on_device: bool, workers: int = 0) -> list[tuple[Tensor, Tensor]]:
    data = ImageData(
        Splits("s", images, images),
        image_size=28,
        batch_size=4,
        augment=augment,
        on_device=on_device,
        num_workers=workers,
    )
    assert data.on_device is (on_device and augment in ("crop", "rotate"))
    return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


@pytest.mark.parametrize("augment", ["crop", "rotate", "trivial", "none"])
@pytest.mark.parametrize("workers", [0, 2])
def test_views_cropped_on_the_device_equal_those_cropped_on_the_cpu(
    cached: LabeledImages, augment: str, workers: int
) -> None:
    on_device = batches(cached, augment, on_device=True, workers=workers)
    on_cpu = batches(cached, augment, on_device=False)
    assert len(on_device) == len(on_cpu) == 2
    for (views, labels), (expected, same) in zip(on_device, on_cpu, strict=True):
        assert (views.shape, views.dtype) == (expected.shape, torch.float32)
        torch.testing.assert_close(labels, same)
        assert (views - expected).abs().mean() < 0.01


def test_batches_of_resident_images_contain_no_pixels(cached: LabeledImages) -> None:
    data = ImageData(Splits("s", cached, cached), image_size=28, augment="rotate", on_device=True)
    indices = [(0, 3), (0, 1), (5, 3)]
    transferred, labels = DeferredCropDataset(data.train_views, resident=False).__getitems__(indices)
    resident, same = DeferredCropDataset(data.train_views, resident=True).__getitems__(indices)
    torch.testing.assert_close(labels, same)
    assert resident.pixels is None
    with pytest.raises(ValueError, match="neither in the batch nor on the device"):
        resident.crop(None)
    pixels = torch.from_numpy(np.fromfile(cached.load.path, dtype=np.uint8))  # type: ignore[attr-defined]
    torch.testing.assert_close(resident.crop(pixels), transferred.crop(None), rtol=0, atol=0)


def test_only_cached_images_are_cropped_on_the_device(cached: LabeledImages, tmp_path: Path) -> None:
    files = read_folder(tmp_path / "images")
    for images, is_deferred in (
        (cached, True),
        (files, False),
        (concatenate(cached, cached), True),
        (concatenate(cached, files), False),
    ):
        data = ImageData(Splits("s", images, images), image_size=28, on_device=True)
        assert can_defer_crops(data.train_views) is data.on_device is is_deferred


def test_other_augmentations_than_crops_are_refused(cached: LabeledImages) -> None:
    data = ImageData(Splits("s", cached, cached), image_size=28, augment="trivial", on_device=True)
    with pytest.raises(TypeError, match="not random resized crops"):
        DeferredCropDataset(data.train_views, resident=False).__getitems__([(0, 0)])


def test_a_batch_survives_lightnings_transfer(cached: LabeledImages) -> None:
    data = ImageData(Splits("s", cached, cached), image_size=28, batch_size=4, on_device=True)
    batch = next(iter(data.train_dataloader()))
    moved, _ = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert isinstance(moved, DeferredCrops)
    views, _ = data.on_after_batch_transfer((moved, batch[1]), 0)
    assert views.is_contiguous()
    data.channels_last = True
    views, _ = data.on_after_batch_transfer((moved, batch[1]), 0)
    assert views.is_contiguous(memory_format=torch.channels_last)
