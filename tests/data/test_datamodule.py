from pathlib import Path

import pytest
import torch
from PIL import Image

from kd.data import UNLABELED, ImageData, read_splits, read_unlabeled
from kd.errors import UserError
from kd.training import draw_views
from tests.conftest import MakeFolder


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_all_validation_images_count_whatever_the_batch_size(make_folder: MakeFolder, batch_size: int) -> None:
    splits = read_splits(make_folder(val=5))
    batches = [labels for _, labels in ImageData(splits, image_size=8, batch_size=batch_size).val_dataloader()]
    assert sorted(torch.cat(batches).tolist()) == list(splits.val.labels)


def test_the_first_validation_batches_are_not_of_one_class_and_always_the_same(make_folder: MakeFolder) -> None:
    splits = read_splits(make_folder(val=20))
    first = [
        next(iter(ImageData(splits, image_size=8, batch_size=12, seed=seed).val_dataloader()))[1] for seed in (0, 1)
    ]
    assert first[0].tolist() == first[1].tolist()
    assert set(first[0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 8, 8]), (10, [10, 10, 4]), (23, [23]), (1, [1] * 24)])
def test_no_training_image_is_left_out_but_a_lone_last_one(
    make_folder: MakeFolder, batch_size: int, sizes: list[int]
) -> None:
    data = ImageData(read_splits(make_folder(train=8)), image_size=8, batch_size=batch_size)
    assert [len(labels) for _, labels in data.train_dataloader()] == sizes


def test_a_single_training_image_is_refused(make_folder: MakeFolder) -> None:
    data = ImageData(read_splits(make_folder()), image_size=8)
    data.train_indices = [0]
    with pytest.raises(UserError, match="training needs at least two images per device"):
        data.train_dataloader()


def test_pixels_become_numbers_from_zero_to_one(make_folder: MakeFolder) -> None:
    data = ImageData(read_splits(make_folder()), image_size=8, augment="none")
    images, labels = next(iter(data.val_dataloader()))
    assert images.dtype == torch.uint8
    numbers, same_labels = data.on_after_batch_transfer((images, labels), 0)
    torch.testing.assert_close(numbers, images.double().div(255).float())
    assert same_labels is labels
    again, _ = data.on_after_batch_transfer((numbers, labels), 0)
    assert again is numbers


def training_labels(data: ImageData) -> dict[str, int]:
    """Return the label of each training image that an epoch gives, by its key."""
    images = data.train_views.images
    assert len(set(data.train_indices)) == len(data.train_indices)
    return {images.keys[index]: images.labels[index] for index in data.train_indices}


def unlabeled_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "more"
    for name in ("a.png", "deep/er/b.png", "deep/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (0, 200, 0)).save(folder / name)
    return folder


def test_images_without_labels_follow_the_labeled_ones(make_folder: MakeFolder, tmp_path: Path) -> None:
    splits = read_splits(make_folder(train=4))
    data = ImageData(splits, image_size=8, batch_size=4, unlabeled=read_unlabeled(unlabeled_folder(tmp_path)))
    assert data.has_unlabeled
    known = training_labels(ImageData(splits, image_size=8))
    more = {f"unlabeled/{name}": UNLABELED for name in ("a.png", "deep/c.png", "deep/er/b.png")}
    assert training_labels(data) == known | more
    batches = list(data.train_dataloader())
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == [-1] * 3 + sorted(splits.train.labels)
    pixels = torch.cat([images for images, _ in batches])
    assert (pixels[labels == UNLABELED][:, 1] > 150).all()


def test_what_the_fraction_leaves_out_may_stay_without_its_labels(make_folder: MakeFolder) -> None:
    splits = read_splits(make_folder(train=8))
    kept = training_labels(ImageData(splits, image_size=8, train_fraction=0.25, seed=3))
    whole = training_labels(ImageData(splits, image_size=8, train_fraction=0.25, seed=3, unlabeled_rest=True))
    assert len(kept) == 6
    assert len(whole) == 24
    assert {key: label for key, label in whole.items() if label != UNLABELED} == kept


def test_labels_can_be_hidden_all_of_them(make_folder: MakeFolder, tmp_path: Path) -> None:
    splits = read_splits(make_folder(train=8))
    more = read_unlabeled(unlabeled_folder(tmp_path))
    data = ImageData(splits, image_size=8, train_fraction=0.5, reads_labels=False, unlabeled=more)
    assert list(training_labels(data).values()) == [UNLABELED] * (12 + 3)
    # Those of the validation images are measured with.
    assert sorted(torch.cat([labels for _, labels in data.val_dataloader()]).tolist()) == list(splits.val.labels)
    assert not ImageData(splits, image_size=8).has_unlabeled


def test_a_picture_of_an_image_without_a_label_says_so(make_folder: MakeFolder) -> None:
    splits = read_splits(make_folder())
    drawn = [draw_views(ImageData(splits, image_size=32, reads_labels=reads), count=2) for reads in (True, False)]
    assert drawn[0].shape == drawn[1].shape
    assert not torch.equal(drawn[0], drawn[1])
