import pytest
import torch

from kd.data import ImageData, read_splits
from kd.errors import UserError
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
    with pytest.raises(UserError, match="a single training image"):
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
