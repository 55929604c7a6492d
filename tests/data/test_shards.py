"""Shards: written from a folder, and streamed in an order and with views that depend on the seed."""

import io
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from kd.data import (
    ImageData,
    LabeledImages,
    Layout,
    ShardData,
    ShardedSplits,
    Splits,
    load_splits,
    read_splits,
    write_shards,
)
from kd.data.samples import read_samples
from kd.data.streamed import StreamedBatches, plan_batches
from kd.errors import UserError
from tests.conftest import MakeFolder

pytest.importorskip("webdataset")

TRAIN, VAL = 7, 5


@pytest.fixture
def photos(make_folder: MakeFolder) -> Path:
    return make_folder(train=TRAIN, val=VAL, size=(24, 20))


@pytest.fixture
def sharded(photos: Path) -> Path:
    write_shards(read_splits(photos), photos.parent / "sharded", per_shard=4)
    return photos.parent / "sharded"


def splits_in(folder: Path, **options: Any) -> ShardedSplits:
    splits = load_splits("webdataset", folder, Layout(**options))
    assert isinstance(splits, ShardedSplits)
    return splits


def batches_of(data: ShardData, rank: int, world_size: int) -> StreamedBatches:
    return data._train_batches(data._train_plan(rank, world_size))


def keys_of(batches: StreamedBatches, epoch: int = 0) -> list[list[str]]:
    return [[sample.key for sample in batches.samples(epoch, batch)] for batch in range(len(batches))]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def png(color: tuple[int, int, int] = (200, 0, 0)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), color).save(file, "png")
    return file.getvalue()


def write_shards_without_index(folder: Path, **files: bytes) -> Path:
    """Write shards of two classes without an index; ``files`` are added to the second training shard."""
    for name, extra in (("train/a.tar", {}), ("train/b.tar", files), ("val/a.tar", {})):
        write_tar(folder / name, {"1.png": png(), "1.cls": b"0", "2.cls": b"1\n", "2.png": png()} | extra)
    (folder / "classes.txt").write_text("ant\nbee\n")
    return folder


def test_every_file_is_in_a_shard_and_counted_in_the_index(photos: Path, sharded: Path) -> None:
    folder = read_splits(photos)
    assert (sharded / "classes.txt").read_text().split() == list(folder.classes)
    index = json.loads((sharded / "index.json").read_text())
    for name, images in (("train", folder.train), ("val", folder.val)):
        contents: dict[str, bytes] = {}
        for shard in index[name]["shards"]:
            with tarfile.open(sharded / shard["name"]) as archive:
                files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
            assert len(files) == 2 * shard["images"] <= 8
            contents |= files
        for key, path, label in zip(images.keys, images.files, images.labels, strict=True):
            assert contents[key] == path.read_bytes()
            assert contents[f"{key.removesuffix('.png')}.cls"] == str(label).encode()
        assert index[name]["counts"] == [len(images) // 3] * 3
    assert list(sharded.parent.glob("*.part")) == []


def test_shards_are_reproducible_and_their_classes_shuffled(photos: Path, sharded: Path) -> None:
    again, other = (sharded.parent / name for name in ("again", "other"))
    for folder, seed in ((again, 0), (other, 1)):
        write_shards(read_splits(photos), folder, per_shard=4, seed=seed)
    first = [(folder / "train" / "000000.tar").read_bytes() for folder in (sharded, again, other)]
    assert first[0] == first[1] != first[2]
    labels = splits_in(sharded).val.labels
    assert sorted(labels) != list(labels)


def test_an_existing_folder_is_not_overwritten(photos: Path, sharded: Path) -> None:
    with pytest.raises(UserError, match="sharded: this already exists"):
        write_shards(read_splits(photos), sharded)


def test_images_without_files_are_refused(tmp_path: Path) -> None:
    images = LabeledImages(classes=("a", "b"), labels=[0], keys=["1"], load=lambda _: torch.zeros(3, 2, 2))
    with pytest.raises(UserError, match="don't come from files"):
        write_shards(Splits("drawn", images, images), tmp_path / "out")


@pytest.mark.parametrize("batch_size", [1, 2, 4, 20])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_image_is_read_once_per_epoch_by_any_number_of_processes(
    sharded: Path, batch_size: int, world_size: int
) -> None:
    data = ShardData(splits_in(sharded), image_size=8, batch_size=batch_size)
    parts = [keys_of(batches_of(data, rank, world_size)) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    seen = Counter(key for part in parts for batch in part for key in batch)
    counts, drop_last = data._images_per_process(world_size)
    if not drop_last:
        # With batches of one image, the first images are repeated to give each process the same number.
        assert len(seen) == 3 * TRAIN
        assert sum(seen.values()) == (3 * TRAIN if batch_size > 1 else -(-3 * TRAIN // world_size) * world_size)
    else:
        assert set(seen.values()) == {1}
        assert sum(seen.values()) == sum(count // batch_size * batch_size for count in counts)
    val = [data.validation_indices(rank, world_size) for rank in range(world_size)]
    assert sorted(index for part in val for index in part) == list(range(3 * VAL))


@pytest.mark.parametrize("count", [0, 1, 5, 16, 17, 63])
@pytest.mark.parametrize("batch_size", [4, 8, 12])
def test_steps_are_the_same_for_any_number_of_processes(count: int, batch_size: int) -> None:
    def steps(world_size: int) -> list[list[int]]:
        plans = [plan_batches(count, batch_size // world_size, rank, world_size) for rank in range(world_size)]
        return [
            sorted(index for batch in batches for piece in batch for index in piece.substream[piece.first : piece.last])
            for batches in zip(*plans, strict=True)
        ]

    alone = steps(1)
    assert sorted(index for step in alone for index in step) == list(range(count))
    assert [len(step) for step in alone] == [batch_size] * (count // batch_size) + [count % batch_size] * (
        count % batch_size > 0
    )
    assert steps(2) == alone
    # A last batch of an image or none is dropped by four processes.
    assert steps(4)[: count // batch_size] == alone[: count // batch_size]


def epochs(data: ShardData, number: int = 2) -> list[tuple[Tensor, Tensor]]:
    loader = data.train_dataloader()
    batches = []
    for epoch in range(number):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches += [tuple(batch) for batch in loader]
    return batches


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(sharded: Path, workers: int) -> None:
    splits = splits_in(sharded)
    alone, shared = (
        epochs(ShardData(splits, image_size=8, batch_size=2, augment="rotate", num_workers=number))
        for number in (0, workers)
    )
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)
    assert len(alone) == 2 * 10


def test_the_order_depends_on_seed_and_epoch(sharded: Path) -> None:
    def order(seed: int, epoch: int) -> list[list[str]]:
        return keys_of(batches_of(ShardData(splits_in(sharded), image_size=8, batch_size=2, seed=seed), 0, 1), epoch)

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))}) == 3
    # Images are also shuffled within a shard.
    single = ShardData(splits_in(sharded, train_data="train/000000.tar"), image_size=8, batch_size=4)
    assert len({str(keys_of(batches_of(single, 0, 1), epoch)) for epoch in range(8)}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_continues_with_the_next_batch(sharded: Path, workers: int) -> None:
    def batches(skipped: int) -> list[Tensor]:
        data = ShardData(splits_in(sharded), image_size=8, batch_size=2, num_workers=workers)
        loader = data.train_dataloader()
        views: list[Tensor] = []
        for epoch in (3, 4):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            loader.sampler.skip(skipped if epoch == 3 else 0)  # type: ignore[attr-defined]
            views += [images for images, _ in loader]
        return views

    # Also after a second batch of a substream; the following epoch is complete.
    for skipped in (1, 9):
        torch.testing.assert_close(batches(skipped), batches(0)[skipped:], rtol=0, atol=0)


def test_batches_repeat_after_a_period(sharded: Path) -> None:
    batches = epochs(ShardData(splits_in(sharded), image_size=8, batch_size=20, period=2), 3)
    torch.testing.assert_close(batches[0], batches[2], rtol=0, atol=0)
    assert not torch.equal(batches[0][0], batches[1][0])


@pytest.mark.parametrize("augment", ["none", "rotate", "trivial"])
def test_views_equal_those_of_the_folder(photos: Path, sharded: Path, augment: str) -> None:
    folder = ImageData(read_splits(photos), image_size=8, augment=augment, seed=3)
    data = ShardData(splits_in(sharded), image_size=8, batch_size=4, augment=augment, seed=3)
    part = batches_of(data, 0, 1)
    keys = list(folder.train_views.images.keys)
    for batch, names in enumerate(keys_of(part, epoch=5)):
        expected = [folder.train_views[5, keys.index(name)] for name in names]
        views, labels = part[5, batch]
        torch.testing.assert_close(list(views), [view for view, _ in expected], rtol=0, atol=0)
        assert labels.tolist() == [label for _, label in expected]


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_batches_follow_the_validation_indices(sharded: Path, workers: int) -> None:
    splits = splits_in(sharded)
    data = ShardData(splits, image_size=8, batch_size=2, num_workers=workers)
    batches = list(data.val_dataloader())
    order = data.validation_indices()
    assert sorted(order) == list(range(3 * VAL))
    assert torch.cat([labels for _, labels in batches]).tolist() == [splits.val.labels[index] for index in order]
    # Random access gives the same images.
    expected = torch.stack([ImageData(splits, image_size=8).val_views[0, index][0] for index in order])
    torch.testing.assert_close(torch.cat([views for views, _ in batches]), expected, rtol=0, atol=0)


def test_labels_can_be_hidden(sharded: Path) -> None:
    data = ShardData(splits_in(sharded), image_size=8, reads_labels=False)
    assert data.has_unlabeled
    assert set(torch.cat([labels for _, labels in data.train_dataloader()]).tolist()) == {-1}
    assert -1 not in torch.cat([labels for _, labels in data.val_dataloader()])


def test_shards_without_an_index_are_scanned_once(tmp_path: Path) -> None:
    folder = write_shards_without_index(tmp_path / "shards")
    splits = splits_in(folder)
    assert (splits.train_size, splits.train_counts, splits.val.keys) == (4, (2, 2), ["1.png", "2.png"])
    cached = list((tmp_path / "cache" / "shards").glob("*.json"))
    assert len(cached) == 2
    before = [path.stat().st_mtime_ns for path in cached]
    assert splits_in(folder).train_size == 4
    assert [path.stat().st_mtime_ns for path in cached] == before
    part = splits_in(folder, train_data="train/{a..b}.tar", val_data="val/a.tar")
    assert (part.train_size, len(part.val)) == (4, 2)


@pytest.mark.parametrize("first", [0, 1, 49, 50, 51, 109])
def test_reading_starts_at_any_sample_of_a_shard(tmp_path: Path, first: int) -> None:
    # Every other name is too long for the regular header.
    files = {f"{'long' * (30 * (number % 2))}{number}": png() for number in range(110)}
    shard_files = {
        f"{name}.{end}": value for name, png_ in files.items() for end, value in (("png", png_), ("cls", b"1"))
    }
    write_tar(tmp_path / "a.tar", shard_files)
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    splits = splits_in(tmp_path, train_data="a.tar", val_data="a.tar")
    (shard,) = splits.train_shards.entries
    assert len(shard.marks) == 3
    keys = [sample.key for sample in read_samples(shard, first, 110, classes=2)]
    assert keys == [f"{name}.png" for name in list(files)[first:]] == list(splits.val.keys)[first:]


def test_shards_are_read_through_a_command(sharded: Path) -> None:
    local = splits_in(sharded)
    pattern = f"pipe:cat {sharded}/train/{{000000..000005}}.tar"
    piped = splits_in(sharded, train_data=pattern)
    keys = [keys_of(batches_of(ShardData(splits, image_size=8, batch_size=2), 0, 1)) for splits in (local, piped)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"3.png": png(), "3.cls": b"2"}, r"b\.tar: label 3\.cls is 2, but classes\.txt has 2 classes \(0 to 1\)"),
        ({"3.png": png(), "3.cls": b"bee"}, r"b\.tar: label 3\.cls must be an integer, not 'bee'"),
        ({"3.png": png(), "4.png": png(), "4.cls": b"0"}, r"b\.tar: sample 3 has no label; add 3\.cls"),
        (
            {"3.png": png(), "4.png": png(), "3.cls": b"1", "4.cls": b"0"},
            r"add 3\.cls next to its image in the archive",
        ),
        ({"3.cls": b"1"}, r"b\.tar: sample 3 has no image"),
        ({"3.cls": b"1", "3.png": png(), "3.jpg": png()}, r"b\.tar: sample 3 has 2 images"),
    ],
)
def test_an_invalid_sample_is_an_error_before_training(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError, match=message):
        splits_in(write_shards_without_index(tmp_path / "shards", **files))


def test_a_missing_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    with pytest.raises(UserError, match="--dataset webdataset: set --data_dir"):
        load_splits("webdataset")
    with pytest.raises(UserError, match=f"--data_dir {folder}: there is no such folder"):
        splits_in(folder)
    write_shards_without_index(folder)
    (folder / "val" / "a.tar").rename(folder / "val" / "a.tgz")
    with pytest.raises(UserError, match=r"val: there are no shards \(\*\.tar\) in this folder, set by --val_data"):
        splits_in(folder)
    with pytest.raises(UserError, match=r"test: there is no such folder of shards \(set by --val_data\)"):
        splits_in(folder, val_data="test")
    with pytest.raises(UserError, match=r"this remote shard is not in .*index\.json"):
        splits_in(folder, train_data="https://nowhere.example/train/{a..b}.tar")
    with pytest.raises(UserError, match=r"--train_data \{a: this pattern is invalid"):
        splits_in(folder, train_data="{a")
    (folder / "train" / "b.tar").write_bytes(b"no archive at all")
    with pytest.raises(UserError, match=r"b\.tar: this shard can't be read"):
        splits_in(folder)
    write_tar(folder / "train" / "b.tar", {"README": b"nothing"})
    with pytest.raises(UserError, match=r"b\.tar: this shard has no samples"):
        splits_in(folder)


def test_a_byte_order_mark_is_no_part_of_a_class_name(sharded: Path) -> None:
    expected = splits_in(sharded).classes
    text = (sharded / "classes.txt").read_text(encoding="utf-8")
    (sharded / "classes.txt").write_text(text, encoding="utf-8-sig")
    assert splits_in(sharded).classes == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"classes\.txt: there is no such file; list the class names"),
        ("ant\n", "there is only one class, 'ant'"),
        ("ant\n\nbee\n", "line 2 is empty"),
        ("ant\nbee\nant\n", "class 'ant' occurs twice"),
    ],
)
def test_an_invalid_classes_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    folder = write_shards_without_index(tmp_path / "shards")
    (folder / "classes.txt").unlink()
    if text is not None:
        (folder / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        splits_in(folder)


def test_an_invalid_or_outdated_index_is_refused(sharded: Path) -> None:
    with (sharded / "classes.txt").open("a") as file:
        file.write("dog\n")
    with pytest.raises(UserError, match=r"this index has 3 classes, but classes\.txt has 4"):
        splits_in(sharded)
    (sharded / "classes.txt").write_text("ant\nbee\ncat\n")
    with (sharded / "train" / "000002.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"000002\.tar: this shard has [\d,]+ bytes, but .*index\.json says"):
        splits_in(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 0}', '{"version": 1, "train": {"shards": [{}]}}'])
def test_a_damaged_index_is_replaced_by_counting(sharded: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    def counts() -> tuple[int, int, Any, list[Any]]:
        splits = splits_in(sharded)
        return len(splits.train_shards), len(splits.val_shards), splits.train_shards.counts, list(splits.val.labels)

    expected = counts()
    (sharded / "index.json").write_text(text)
    assert counts() == expected
    assert "index.json: this index is damaged" in caplog.text
    # The cached counts, too.
    for path in Path(os.environ["KD_CACHE"]).glob("shards/*.json"):
        path.write_text(text)
    assert counts() == expected


def test_a_shard_with_missing_samples_is_an_error_when_read(sharded: Path) -> None:
    data = ShardData(splits_in(sharded), image_size=8, batch_size=20)
    write_tar(sharded / "train" / "000001.tar", {"1.png": png(), "1.cls": b"0"})
    with pytest.raises(UserError, match=r"000001\.tar: this shard has 1 samples, but its index says 4"):
        keys_of(batches_of(data, 0, 1))
    (sharded / "train" / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001\.tar: this shard can't be read: .*No such file"):
        keys_of(batches_of(data, 0, 1))


def test_an_undecodable_image_is_an_error_or_skipped(tmp_path: Path) -> None:
    splits = splits_in(write_shards_without_index(tmp_path / "shards", **{"3.png": b"no image", "3.cls": b"0"}))
    with pytest.raises(UserError, match=r"b\.tar, 3\.png: this image can't be decoded"):
        list(ShardData(splits, image_size=8, batch_size=5).train_dataloader())
    messages: list[str] = []
    (batch,) = ShardData(splits, image_size=8, batch_size=5, left_out=messages.append).train_dataloader()
    assert (len(batch[1]), len(messages)) == (4, 1)


def test_the_error_for_missing_webdataset_names_the_install_command(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r"webdataset is not installed; run pip install webdataset .*extra shards"):
        splits_in(sharded)
