import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.data import AUGMENTATIONS, ImageData, plain_view, read_splits
from kd.data.views import EpochSampler, Views, training_view
from kd.errors import UserError
from tests.conftest import MakeFolder


@pytest.mark.parametrize("augment", ["none", *AUGMENTATIONS])
@pytest.mark.parametrize("shape", [(3, 20, 30), (3, 64, 9)])
def test_every_augmentation_returns_uint8_squares(augment: str, shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = training_view(augment, 16)(pixels)
    assert (tuple(view.shape), view.dtype) == ((3, 16, 16), torch.uint8)


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(UserError, match=r"there is no augmentation 'corp'; did you mean 'crop'\?"):
        training_view("corp", 16)


def test_crop_keeps_the_aspect_ratio_and_squash_does_not() -> None:
    # A white square in the center of a wide black image.
    pixels = torch.zeros(3, 20, 60, dtype=torch.uint8)
    pixels[:, :, 20:40] = 255
    assert plain_view(16, "crop")(pixels).float().mean() > 250
    assert plain_view(16, "squash")(pixels).float().mean() == pytest.approx(255 / 3, abs=10)


@pytest.mark.parametrize("augment", list(AUGMENTATIONS))
def test_a_view_is_a_function_of_seed_epoch_and_image(make_folder: MakeFolder, augment: str) -> None:
    train = read_splits(make_folder(size=(40, 40))).train

    def view(*, seed: int = 0, epoch: int = 0, index: int = 0) -> Tensor:
        torch.rand(7)  # global random state has no effect
        return Views(train, training_view(augment, 16), seed=seed)[epoch, index][0]

    assert torch.equal(view(), view())
    others = [view(seed=1), view(epoch=1), view(epoch=2), view(index=1)]
    # Two of 25 shifts may be the same.
    least = 2 if augment == "pad_crop" else len(others)
    assert sum(not torch.equal(view(), other) for other in others) >= least


def test_a_view_depends_on_the_image_not_on_its_index(make_folder: MakeFolder) -> None:
    root = make_folder(size=(40, 40))
    before = read_splits(root).train
    (root / "train" / "ant" / "0.png").unlink()
    after = read_splits(root).train
    views = [Views(images, training_view("crop", 16), seed=0) for images in (before, after)]
    assert torch.equal(views[0][4, before.keys.index("bee/3.png")][0], views[1][4, after.keys.index("bee/3.png")][0])


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = EpochSampler(range(20), seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert sorted(index for _, index in order(0, 1)) == list(range(20))
    assert {epoch for epoch, _ in order(0, 1)} == {1}
    assert len({tuple(index for _, index in indices) for indices in (order(0, 0), order(0, 1), order(1, 0))}) == 3


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_images_are_distributed_over_processes(count: int, world_size: int) -> None:
    exact = [EpochSampler(range(count), seed=None, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(index for sampler in exact for _, index in sampler) == list(range(count))
    assert all(len(list(sampler)) == len(sampler) for sampler in exact)
    even = [
        EpochSampler(range(count), seed=0, rank=rank, world_size=world_size, even=True) for rank in range(world_size)
    ]
    assert {len(list(sampler)) for sampler in even} == {len(even[0])}
    assert {index for sampler in even for _, index in sampler} == set(range(count))


# More workers than cores are slow, but valid.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_batches_are_the_same_for_any_number_of_workers(make_folder: MakeFolder) -> None:
    splits = read_splits(make_folder(size=(40, 40)))

    def two_epochs(workers: int) -> list[Tensor]:
        loader = ImageData(
            splits, image_size=16, batch_size=5, augment="trivial", num_workers=workers
        ).train_dataloader()
        batches = []
        for epoch in range(2):
            loader.batch_sampler.sampler.set_epoch(epoch)  # type: ignore[union-attr]
            batches += [part for batch in loader for part in batch]
        return batches

    expected = two_epochs(0)
    assert len(expected) == 20
    for workers in (1, 3):
        torch.testing.assert_close(two_epochs(workers), expected, rtol=0, atol=0)


OWN_VIEWS = """
import random

import numpy as np
import torch
from torchvision.transforms import v2


def noisy(size, strength=10):
    plain = v2.Compose([v2.Resize((size, size), antialias=True), v2.RandomHorizontalFlip()])

    def view(pixels):
        shift = random.randint(0, strength) + np.random.randint(strength) + int(torch.randint(strength, ()))
        return (plain(pixels).int() + shift).clamp(max=255).to(torch.uint8)

    return view


def too_small(size):
    return v2.Resize((size - 1, size - 1), antialias=True)


def floating(size):
    return v2.Compose([v2.Resize((size, size), antialias=True), v2.ToDtype(torch.float32)])


def failing(size):
    return lambda pixels: pixels.no_such_method()


def forgetful(size):
    return None
"""


def test_a_transform_of_the_users_is_a_view_like_any_other(tmp_path: Path, make_folder: MakeFolder) -> None:
    code = tmp_path / "own.py"
    code.write_text(OWN_VIEWS)
    images = read_splits(make_folder()).train
    views = Views(images, training_view(f"{code}:noisy(strength=40)", 16), seed=3)
    state = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    first = [views[0, index][0] for index in range(4)]
    random.random()  # noqa: S311
    assert all(torch.equal(views[0, index][0], view) for index, view in reversed(list(enumerate(first))))
    assert not all(torch.equal(views[1, index][0], view) for index, view in enumerate(first))
    random.setstate(state[0])
    views[0, 0]
    assert (random.getstate(), str(np.random.get_state())) == state[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_small", r"a view must be a uint8 tensor of shape \(3, 16, 16\), not torch.uint8 of shape \(3, 15, 15\)"),
        ("floating", "not torch.float32 of shape"),
        ("failing", "it raised AttributeError at line 28"),
        ("forgetful", "it raised TypeError"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_transform_that_makes_no_views_is_refused(tmp_path: Path, name: str, message: str) -> None:
    code = tmp_path / "own.py"
    code.write_text(OWN_VIEWS)
    with pytest.raises(UserError, match=f"--augment .*own.py:{name}: .*{message}"):
        training_view(f"{code}:{name}", 16)


def test_options_of_augmentations_are_checked() -> None:
    training_view("rand(num_ops=1, magnitude=3)", 16)
    training_view("pad_crop(padding=2)", 16)
    with pytest.raises(UserError, match=r"--augment rand\(size=3\): .* multiple values"):
        training_view("rand(size=3)", 16)
    with pytest.raises(UserError, match=r"--augment crop\(scale=1\): .*there is no hyperparameter 'scale'"):
        training_view("crop(scale=1)", 16)
    with pytest.raises(UserError, match=r"--augment cropp: there is no augmentation 'cropp'; did you mean 'crop'\?"):
        training_view("cropp", 16)


def test_random_rectangles_are_erased(make_folder: MakeFolder) -> None:
    images = read_splits(make_folder(size=(40, 40))).train
    plain = Views(images, training_view("none", 32), seed=None)
    erased = Views(images, training_view("none", 32, erasing=0.5), seed=0)
    count = 0
    for index in range(len(images)):
        before, after = plain[0, index][0], erased[0, index][0]
        changed = (before != after).any(dim=0)
        if changed.any():
            count += 1
            rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
            inside = after[:, int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]
            assert inside.flatten(1).unique(dim=1).T.tolist() == [[124, 116, 104]]
    assert 0 < count < len(images)
    assert all(torch.equal(erased[0, index][0], erased[0, index][0]) for index in range(3))
