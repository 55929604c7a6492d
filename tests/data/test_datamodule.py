from pathlib import Path

import pytest
import torch
from PIL import Image

from kd.data import UNLABELED, ImageData, read_splits, read_unlabeled
from kd.errors import UserError
from kd.training import draw_views
from tests.conftest import MakeFolder


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_every_validation_image_is_used_for_any_batch_size(make_folder: MakeFolder, batch_size: int) -> None:
    splits = read_splits(make_folder(val=5))
    batches = [labels for _, labels in ImageData(splits, image_size=8, batch_size=batch_size).val_dataloader()]
    assert sorted(torch.cat(batches).tolist()) == list(splits.val.labels)


def test_validation_batches_mix_classes_in_an_order_independent_of_the_seed(make_folder: MakeFolder) -> None:
    splits = read_splits(make_folder(val=20))
    first = [
        next(iter(ImageData(splits, image_size=8, batch_size=12, seed=seed).val_dataloader()))[1] for seed in (0, 1)
    ]
    assert first[0].tolist() == first[1].tolist()
    assert set(first[0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 8, 8]), (10, [10, 10, 4]), (23, [23]), (1, [1] * 24)])
def test_only_a_last_batch_of_one_training_image_is_dropped(
    make_folder: MakeFolder, batch_size: int, sizes: list[int]
) -> None:
    data = ImageData(read_splits(make_folder(train=8)), image_size=8, batch_size=batch_size)
    assert [len(labels) for _, labels in data.train_dataloader()] == sizes


def test_a_single_training_image_is_refused(make_folder: MakeFolder) -> None:
    data = ImageData(read_splits(make_folder()), image_size=8)
    data.train_indices = [0]
    with pytest.raises(UserError, match="training needs at least two images per device"):
        data.train_dataloader()


def test_pixels_are_scaled_to_the_unit_interval(make_folder: MakeFolder) -> None:
    data = ImageData(read_splits(make_folder()), image_size=8, augment="none")
    images, labels = next(iter(data.val_dataloader()))
    assert images.dtype == torch.uint8
    scaled, same_labels = data.on_after_batch_transfer((images, labels), 0)
    torch.testing.assert_close(scaled, images.double().div(255).float())
    assert same_labels is labels
    again, _ = data.on_after_batch_transfer((scaled, labels), 0)
    assert again is scaled


def training_labels(data: ImageData) -> dict[str, int]:
    """Return the label of each training image of an epoch, by key."""
    images = data.train_views.images
    assert len(set(data.train_indices)) == len(data.train_indices)
    return {images.keys[index]: images.strata[index] for index in data.train_indices}


def unlabeled_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "unlabeled"
    for name in ("a.png", "deep/er/b.png", "deep/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (0, 200, 0)).save(folder / name)
    return folder


def test_unlabeled_images_are_added_to_the_training_images(make_folder: MakeFolder, tmp_path: Path) -> None:
    splits = read_splits(make_folder(train=4))
    data = ImageData(splits, image_size=8, batch_size=4, unlabeled=read_unlabeled(unlabeled_folder(tmp_path)))
    assert data.has_unlabeled
    labeled = training_labels(ImageData(splits, image_size=8))
    unlabeled = {f"unlabeled/{name}": UNLABELED for name in ("a.png", "deep/c.png", "deep/er/b.png")}
    assert training_labels(data) == labeled | unlabeled
    batches = list(data.train_dataloader())
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == [-1] * 3 + sorted(splits.train.labels)
    pixels = torch.cat([images for images, _ in batches])
    assert (pixels[labels == UNLABELED][:, 1] > 150).all()


def test_images_outside_the_train_fraction_can_be_kept_unlabeled(make_folder: MakeFolder) -> None:
    splits = read_splits(make_folder(train=8))
    kept = training_labels(ImageData(splits, image_size=8, train_fraction=0.25, seed=3))
    all_images = training_labels(ImageData(splits, image_size=8, train_fraction=0.25, seed=3, unlabeled_rest=True))
    assert len(kept) == 6
    assert len(all_images) == 24
    assert {key: label for key, label in all_images.items() if label != UNLABELED} == kept


def test_training_labels_can_be_hidden(make_folder: MakeFolder, tmp_path: Path) -> None:
    splits = read_splits(make_folder(train=8))
    unlabeled = read_unlabeled(unlabeled_folder(tmp_path))
    data = ImageData(splits, image_size=8, train_fraction=0.5, reads_labels=False, unlabeled=unlabeled)
    assert list(training_labels(data).values()) == [UNLABELED] * (12 + 3)
    # Validation labels are not hidden, as the accuracy is computed from them.
    assert sorted(torch.cat([labels for _, labels in data.val_dataloader()]).tolist()) == list(splits.val.labels)
    assert not ImageData(splits, image_size=8).has_unlabeled


def test_the_view_grid_marks_unlabeled_images(make_folder: MakeFolder) -> None:
    splits = read_splits(make_folder())
    drawn = [draw_views(ImageData(splits, image_size=32, reads_labels=reads), count=2) for reads in (True, False)]
    assert drawn[0].shape == drawn[1].shape
    assert not torch.equal(drawn[0], drawn[1])
