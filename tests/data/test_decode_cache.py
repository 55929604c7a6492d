"""The cache of decoded images preserves their pixels."""

import errno
import os
import pickle
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from kd.data import ImageData, LabeledImages, Splits, cache_decoded, plain_view, read_folder, room_for_cache
from kd.data.folders import load_image
from kd.errors import UserError
from tests.conftest import write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", [(40, 30), (30, 44), (12, 10)])


def test_plain_views_of_cached_images_are_bit_identical(folder: Path, tmp_path: Path) -> None:
    files = read_folder(folder)
    cached = cache_decoded(files, round(14 * 8 / 7), tmp_path / "caches")
    for index in range(len(files)):
        torch.testing.assert_close(
            plain_view(14)(cached.load(index)), plain_view(14)(files.load(index)), rtol=0, atol=0
        )
    assert cached.cached_side == 16


def test_images_are_downscaled_but_never_upscaled(folder: Path, tmp_path: Path) -> None:
    cached = cache_decoded(read_folder(folder), 16, tmp_path / "caches")
    assert [tuple(cached.load(index).shape) for index in range(3)] == [(3, 16, 21), (3, 23, 16), (3, 10, 12)]
    torch.testing.assert_close(cached.load(2), load_image(folder / "ant" / "2.png"), rtol=0, atol=0)


def test_a_later_run_reads_only_the_cache(folder: Path, tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    files = read_folder(folder)
    first = cache_decoded(files, 16, tmp_path / "caches", progress=lambda *counts: reported.append(counts))
    assert reported == [(6, 6)]
    for path in files.files:
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = cache_decoded(files, 16, tmp_path / "caches", progress=lambda *counts: reported.append(counts))
    assert len(reported) == 1
    torch.testing.assert_close(again.load(3), first.load(3), rtol=0, atol=0)


def test_a_changed_file_is_decoded_again(folder: Path, tmp_path: Path) -> None:
    before = cache_decoded(read_folder(folder), 16, tmp_path / "caches")
    Image.new("RGB", (30, 30), (9, 9, 9)).save(folder / "ant" / "0.png")
    after = cache_decoded(read_folder(folder), 16, tmp_path / "caches")
    assert not torch.equal(after.load(0)[0, :10, :10], before.load(0)[0, :10, :10])
    torch.testing.assert_close(after.load(1), before.load(1), rtol=0, atol=0)


def test_a_cache_left_incomplete_by_a_killed_run_is_rebuilt(folder: Path, tmp_path: Path) -> None:
    first = cache_decoded(read_folder(folder), 16, tmp_path / "caches")
    (path,) = [entry for entry in (tmp_path / "caches").iterdir() if entry.is_dir()]
    (path / "index.npz").unlink()
    (path / "pixels.u8").write_bytes(b"half")
    (path / ".pixels.u8.abc.tmp").write_bytes(b"half")
    again = cache_decoded(read_folder(folder), 16, tmp_path / "caches")
    torch.testing.assert_close(again.load(4), first.load(4), rtol=0, atol=0)
    assert sorted(file.name for file in path.iterdir()) == ["index.npz", "pixels.u8"]


@pytest.mark.parametrize("damage", ["flipped", "overwritten", "truncated", "deleted"])
def test_damaged_images_are_decoded_again_and_repaired(folder: Path, tmp_path: Path, damage: str) -> None:
    files = read_folder(folder)
    expected = [cache_decoded(files, 16, tmp_path / "caches").load(index).clone() for index in range(6)]
    (pixels,) = (tmp_path / "caches").glob("*/pixels.u8")
    content = bytearray(pixels.read_bytes())
    if damage == "deleted":
        pixels.unlink()
    else:
        content[500] ^= 1
        damaged = {"flipped": content, "overwritten": bytes(len(content)), "truncated": content[:-1000]}[damage]
        pixels.write_bytes(bytes(damaged))
    cached = cache_decoded(files, 16, tmp_path / "caches")
    torch.testing.assert_close([cached.load(index) for index in range(6)], expected, rtol=0, atol=0)
    if damage != "deleted":
        content[500] ^= 1
        assert pixels.read_bytes() == content


def test_a_folder_with_the_names_sizes_and_times_of_another_has_its_own_cache(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for path in read_folder(folder).files:
        copy = (other / path.relative_to(folder)).with_suffix(".bmp")
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(path.with_suffix(".bmp"))
        Image.open(path).point(lambda level: 255 - level).save(copy)
        path.unlink()
        for bitmap in (path.with_suffix(".bmp"), copy):
            os.utime(bitmap, (1e9, 1e9))
    first, second = (cache_decoded(read_folder(root), 16, tmp_path / "caches") for root in (folder, other))
    assert not torch.equal(first.load(0), second.load(0))


def test_a_broken_image_is_an_error_with_its_path_and_leaves_no_cache(folder: Path, tmp_path: Path) -> None:
    (folder / "bee" / "1.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(UserError, match=r"1\.png: this image can't be decoded"):
        cache_decoded(read_folder(folder), 16, tmp_path / "caches")
    assert not list((tmp_path / "caches").glob("*/index.npz"))


def test_a_disk_that_fills_up_leaves_no_partial_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        cache_decoded(read_folder(folder), 16, tmp_path / "caches")
    assert [path for path in (tmp_path / "caches").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_images_without_files_or_above_the_size_limit_are_not_cached(folder: Path, tmp_path: Path) -> None:
    files = read_folder(folder)
    # Two images each of 16x21, 23x16 and 10x12 pixels.
    size = 2 * 3 * (16 * 22 + 24 * 16 + 10 * 12)
    assert cache_decoded(files, 16, tmp_path / "caches", has_room=lambda need: need < size) is files
    assert not (tmp_path / "caches").exists()
    assert cache_decoded(files, 16, tmp_path / "caches", has_room=lambda need: need <= size) is not files
    in_memory = LabeledImages(("a", "b"), [0], ["0"], lambda _: torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert cache_decoded(in_memory, 16, tmp_path / "caches") is in_memory


def test_the_cache_is_limited_to_a_fifth_of_the_free_disk_and_half_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(*, disk: int, memory: int) -> int:
        monkeypatch.setattr("shutil.disk_usage", lambda path: Mock(free=disk if path == tmp_path else 0))
        monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}.__getitem__)
        return room_for_cache(tmp_path / "absent" / "caches")

    assert [room(disk=100, memory=1000), room(disk=1000, memory=100), room(disk=0, memory=100)] == [20, 50, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loading_workers_share_the_cache(folder: Path, tmp_path: Path, workers: int) -> None:
    images = cache_decoded(read_folder(folder), 16, tmp_path / "caches")
    images.load(0)
    assert len(pickle.dumps(images)) < 5000
    data = ImageData(Splits("s", images, images), image_size=14, batch_size=3, num_workers=workers)
    batches = [part for batch in data.train_dataloader() for part in batch]
    alone = ImageData(Splits("s", images, images), image_size=14, batch_size=3)
    torch.testing.assert_close(batches, [part for batch in alone.train_dataloader() for part in batch], rtol=0, atol=0)


def test_writing_to_an_image_leaves_the_cache_unchanged(folder: Path, tmp_path: Path) -> None:
    images = cache_decoded(read_folder(folder), 16, tmp_path / "caches")
    before = images.load(0).clone()
    images.load(0).zero_()
    torch.testing.assert_close(images.load(0), before, rtol=0, atol=0)
