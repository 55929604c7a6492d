"""The store of decoded images: the same pixels, read faster."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from kd.data import CacheLimits, ImageData, LabeledImages, Splits, cache_decoded, plain_view, read_folder
from kd.data.folders import load_image
from kd.errors import UserError
from tests.conftest import write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "images", [(40, 30), (30, 44), (12, 10)])


def test_plain_views_are_the_same_to_the_last_bit(folder: Path, tmp_path: Path) -> None:
    files = read_folder(folder)
    stored = cache_decoded(files, round(14 * 8 / 7), tmp_path / "stores")
    for index in range(len(files)):
        torch.testing.assert_close(
            plain_view(14)(stored.load(index)), plain_view(14)(files.load(index)), rtol=0, atol=0
        )
    assert stored.cached_side == 16


def test_short_sides_are_made_smaller_and_never_larger(folder: Path, tmp_path: Path) -> None:
    stored = cache_decoded(read_folder(folder), 16, tmp_path / "stores")
    assert [tuple(stored.load(index).shape) for index in range(3)] == [(3, 16, 21), (3, 23, 16), (3, 10, 12)]
    torch.testing.assert_close(stored.load(2), load_image(folder / "ant" / "2.png"), rtol=0, atol=0)


def test_a_later_run_reads_the_store_and_no_file(folder: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    files = read_folder(folder)
    first = cache_decoded(files, 16, tmp_path / "stores", progress=lambda *how: done.append(how))
    assert done == [(6, 6)]
    for path in files.files:
        facts = path.stat()
        path.write_bytes(b"x" * facts.st_size)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    again = cache_decoded(files, 16, tmp_path / "stores", progress=lambda *how: done.append(how))
    assert len(done) == 1
    torch.testing.assert_close(again.load(3), first.load(3), rtol=0, atol=0)


def test_a_file_that_changed_is_decoded_again(folder: Path, tmp_path: Path) -> None:
    before = cache_decoded(read_folder(folder), 16, tmp_path / "stores")
    Image.new("RGB", (30, 30), (9, 9, 9)).save(folder / "ant" / "0.png")
    after = cache_decoded(read_folder(folder), 16, tmp_path / "stores")
    assert not torch.equal(after.load(0)[0, :10, :10], before.load(0)[0, :10, :10])
    torch.testing.assert_close(after.load(1), before.load(1), rtol=0, atol=0)


def test_what_a_killed_run_left_is_written_over(folder: Path, tmp_path: Path) -> None:
    first = cache_decoded(read_folder(folder), 16, tmp_path / "stores")
    (place,) = [path for path in (tmp_path / "stores").iterdir() if path.is_dir()]
    (place / "index.json").unlink()
    (place / "pixels.u8").write_bytes(b"half")
    place.with_suffix(".part").mkdir()
    again = cache_decoded(read_folder(folder), 16, tmp_path / "stores")
    torch.testing.assert_close(again.load(4), first.load(4), rtol=0, atol=0)
    assert not place.with_suffix(".part").exists()


def test_an_image_that_is_broken_is_named_and_leaves_no_store(folder: Path, tmp_path: Path) -> None:
    (folder / "bee" / "1.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(UserError, match=r"1\.png: this image can't be decoded"):
        cache_decoded(read_folder(folder), 16, tmp_path / "stores")
    assert not list((tmp_path / "stores").glob("*/index.json"))


def test_without_room_or_files_the_images_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    files = read_folder(folder)
    assert cache_decoded(files, 16, tmp_path / "stores", limits=CacheLimits(disk=0.0)) is files
    assert cache_decoded(files, 16, tmp_path / "stores", limits=CacheLimits(memory=0.0)) is files
    assert not (tmp_path / "stores").exists()
    assert cache_decoded(files, 16, tmp_path / "stores", limits=CacheLimits()) is not files
    in_memory = LabeledImages(("a", "b"), [0], ["0"], lambda _: torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert cache_decoded(in_memory, 16, tmp_path / "stores") is in_memory


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_the_store(folder: Path, tmp_path: Path, workers: int) -> None:
    images = cache_decoded(read_folder(folder), 16, tmp_path / "stores")
    images.load(0)
    assert len(pickle.dumps(images)) < 5000
    data = ImageData(Splits("s", images, images), image_size=14, batch_size=3, num_workers=workers)
    batches = [part for batch in data.train_dataloader() for part in batch]
    alone = ImageData(Splits("s", images, images), image_size=14, batch_size=3)
    torch.testing.assert_close(batches, [part for batch in alone.train_dataloader() for part in batch], rtol=0, atol=0)


def test_a_view_can_not_write_into_the_store(folder: Path, tmp_path: Path) -> None:
    images = cache_decoded(read_folder(folder), 16, tmp_path / "stores")
    before = images.load(0).clone()
    images.load(0).zero_()
    torch.testing.assert_close(images.load(0), before, rtol=0, atol=0)
