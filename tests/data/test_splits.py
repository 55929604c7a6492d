"""Where the images of each split come from, and dividing one folder into splits."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kd.data import (
    SPLIT_FILE,
    LabeledImages,
    Layout,
    apply_division,
    divide,
    examine,
    load_splits,
    read_division,
    read_splits,
    write_division,
)
from kd.errors import UserError
from tests.conftest import MakeFolder

CLASSES = ("ant", "bee")


@pytest.fixture
def one_folder(tmp_path: Path) -> Path:
    """Write a folder of class folders without splits: 20 and 10 different images."""
    folder = tmp_path / "photos"
    for label, count in enumerate((20, 10)):
        (folder / CLASSES[label]).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((8, 8, 3), (label, number, 0), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / CLASSES[label] / f"{number}.png")
    return folder


def test_one_folder_of_class_folders_is_divided(one_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"but class folders right in .*photos; .* add --val_fraction 0.2"):
        read_splits(one_folder)
    layout = Layout(val_fraction=0.2, test_fraction=0.1)
    splits = read_splits(one_folder, layout)
    assert (len(splits.train), len(splits.val), splits.test) == (30, 0, None)
    assigned = divide(splits.train, val_fraction=0.2, test_fraction=0.1, seed=0)
    divided = apply_division(splits, assigned)
    assert divided.test is not None
    counts = [Counter(images.labels) for images in (divided.train, divided.val, divided.test)]
    assert counts == [{0: 14, 1: 7}, {0: 4, 1: 2}, {0: 2, 1: 1}]
    # Recorded, and read again by whoever needs the images later.
    write_division(tmp_path / "logs" / SPLIT_FILE, splits.train, assigned)
    again = load_splits("imagefolder", one_folder, layout, recorded_in=tmp_path / "logs" / "baseline" / "version_0")
    assert again.test is not None
    for one, other in ((again.train, divided.train), (again.val, divided.val), (again.test, divided.test)):
        assert (one.keys, one.labels) == (other.keys, other.labels)
    # The record is a table of the images.
    table = Layout(train_data=str(tmp_path / "logs" / SPLIT_FILE))
    assert read_splits(one_folder, table).val.keys == divided.val.keys


def test_another_seed_divides_otherwise(one_folder: Path) -> None:
    images = read_splits(one_folder, Layout(val_fraction=0.2)).train
    first, again, other = (divide(images, val_fraction=0.2, test_fraction=None, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def numbered(contents: list[int], labels: list[int]) -> LabeledImages:
    digests = np.zeros((len(contents), 16), dtype=np.uint8)
    digests[:, 0] = contents
    keys = [f"{index}" for index in range(len(contents))]
    return LabeledImages(CLASSES, labels, keys, lambda _: None, digests=digests)  # type: ignore[arg-type,return-value]


@given(
    contents=st.lists(st.integers(0, 60), min_size=40, max_size=80),
    fractions=st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.4)),
    seed=st.integers(0, 9),
)
@settings(suppress_health_check=[HealthCheck.filter_too_much], deadline=None, max_examples=60)
def test_equal_contents_stay_together_and_the_fractions_hold(
    contents: list[int], fractions: tuple[float, float], seed: int
) -> None:
    images = numbered(contents, [index % 2 for index in range(len(contents))])
    try:
        assigned = divide(images, val_fraction=fractions[0], test_fraction=fractions[1], seed=seed)
    except UserError as error:
        assert "are too few to divide them" in str(error)  # noqa: PT017
        return
    by_content: dict[int, set[str]] = {}
    for content, split in zip(contents, assigned, strict=True):
        by_content.setdefault(content, set()).add(split)
    assert all(len(splits) == 1 for splits in by_content.values())
    most = max(Counter(contents).values())
    for split, fraction in (("val", fractions[0]), ("test", fractions[1])):
        for label in (0, 1):
            members = [each for index, each in enumerate(assigned) if index % 2 == label]
            # Images that are equal to others may shift it.
            assert abs(members.count(split) - fraction * len(members)) <= 1 + 2 * most + len(by_content) / 5


def test_a_recorded_division_is_kept_and_new_images_are_trained_on(one_folder: Path, tmp_path: Path) -> None:
    images, _ = examine(read_splits(one_folder, Layout(val_fraction=0.2)).train)
    assigned = divide(images, val_fraction=0.2, test_fraction=None, seed=0)
    write_division(tmp_path / SPLIT_FILE, images, assigned)
    known = read_division(tmp_path / SPLIT_FILE)
    validated = next(key for key, split in known.items() if split == "val")
    shutil.copy(one_folder / validated, one_folder / "ant" / "copy.png")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(one_folder / "ant" / "new.png")
    more, _ = examine(read_splits(one_folder, Layout(val_fraction=0.2)).train)
    again = dict(zip(more.keys, divide(more, val_fraction=0.2, test_fraction=None, seed=5, known=known), strict=True))
    assert again == known | {"ant/copy.png": "val", "ant/new.png": "train"}


def test_fractions_that_do_not_work_are_refused(one_folder: Path, make_folder: MakeFolder) -> None:
    images = read_splits(one_folder, Layout(val_fraction=0.5)).train
    with pytest.raises(UserError, match=r"--test_fraction 0\.5 --val_fraction 0.5: no training images are left"):
        divide(images, val_fraction=0.5, test_fraction=0.5, seed=0)
    with pytest.raises(
        UserError, match=r"class 'bee': 1 different images are too few to divide them into train and val"
    ):
        divide(numbered([1, 2, 3, 4, 9], [0, 0, 0, 0, 1]), val_fraction=0.2, test_fraction=None, seed=0)
    with pytest.raises(UserError, match=r"--val_fraction 0.2: there are val images already, in val"):
        read_splits(make_folder(), Layout(val_fraction=0.2))


def test_test_images_have_a_folder_of_their_own(make_folder: MakeFolder) -> None:
    folder = make_folder()
    shutil.copytree(folder / "val", folder / "holdout")
    splits = read_splits(folder, Layout(test_data="holdout"))
    assert splits.test is not None
    assert splits.test.labels == splits.val.labels
    with pytest.raises(UserError, match=r"absent: there is no such folder \(set by --test_data"):
        read_splits(folder, Layout(test_data="absent"))


def test_a_split_may_lack_a_class_where_that_is_allowed(make_folder: MakeFolder) -> None:
    folder = make_folder()
    shutil.rmtree(folder / "val" / "bee")
    (folder / "train" / "wasp").mkdir()
    with pytest.raises(UserError, match="wasp: this class has no images; add --allow_missing_classes"):
        read_splits(folder)
    splits = read_splits(folder, Layout(allow_missing_classes=True))
    assert splits.classes == ("ant", "bee", "cat", "wasp")
    assert set(splits.train.labels) == {0, 1, 2}
    assert set(splits.val.labels) == {0, 2}
    (folder / "train" / "wasp").rmdir()
    with pytest.raises(UserError, match=r"different classes; only in .*train: bee; add --allow_missing_classes"):
        read_splits(folder)


@pytest.mark.parametrize("name", ["Bee", "bee ", "be\u0301e"])
def test_names_that_look_alike_are_pointed_out(make_folder: MakeFolder, name: str) -> None:
    folder = make_folder()
    other = "b\u00e9e" if "\u0301" in name else "bee"
    (folder / "train" / "bee").rename(folder / "train" / other)
    (folder / "val" / "bee").rename(folder / "val" / name)
    with pytest.raises(UserError, match="the names differ only in case, spaces or Unicode form"):
        read_splits(folder)
