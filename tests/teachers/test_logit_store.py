"""The store of a teacher's logits."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd.teachers import LogitStore, digest_of_weights

KEY: dict[str, Any] = {"teacher": "a", "views": ["crop", 0]}


def open_store(folder: Path, **more: Any) -> LogitStore:
    return LogitStore(folder, KEY | more, batches=3, batch_size=4, classes=5)


def batch(seed: int, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 16, generator=generator), torch.randn(count, 5, generator=generator)


@pytest.mark.parametrize("count", [4, 2])
def test_stored_logits_are_read_by_another_run(tmp_path: Path, count: int) -> None:
    images, logits = batch(0, count)
    open_store(tmp_path).write(7, 2, images, logits)
    reopened = open_store(tmp_path)
    stored = reopened.read(7, 2, images)
    assert stored is not None
    torch.testing.assert_close(stored, logits, rtol=0, atol=0)
    assert reopened.read_batches == 1


def test_half_precision_is_stored_exactly(tmp_path: Path) -> None:
    images, logits = batch(0)
    open_store(tmp_path).write(0, 0, images, logits.bfloat16())
    stored = open_store(tmp_path).read(0, 0, images)
    assert stored is not None
    torch.testing.assert_close(stored, logits.bfloat16().float(), rtol=0, atol=0)


def test_logits_of_other_images_epochs_or_teachers_are_not_read(tmp_path: Path) -> None:
    images, logits = batch(0)
    store = open_store(tmp_path)
    store.write(0, 1, images, logits)
    assert store.read(0, 0, images) is None
    assert store.read(1, 1, images) is None
    # Other images at this index: another order or view, or a resume from another batch.
    assert store.read(0, 1, batch(1)[0]) is None
    assert store.read(0, 1, images[:2]) is None
    assert store.read(0, 1, images) is not None
    assert open_store(tmp_path, teacher="b").read(0, 1, images) is None


@pytest.mark.parametrize("offset", [0, 4 * 3 * 4 * 5])
def test_corrupt_logits_and_checksums_are_not_read(tmp_path: Path, offset: int) -> None:
    images, logits = batch(0)
    store = open_store(tmp_path)
    store.write(0, 0, images, logits)
    (file,) = store.folder.glob("*.f32")
    content = np.fromfile(file, dtype=np.uint8)
    content[offset] ^= 1
    content.tofile(file)
    assert open_store(tmp_path).read(0, 0, images) is None


def test_a_disk_that_fills_up_only_stops_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail, raising=False)
    images, logits = batch(0)
    store = open_store(tmp_path)
    # Without reserved space, writing to the mapping would end the process with SIGBUS.
    torch.testing.assert_close(store.write(0, 0, images, logits), logits)
    assert store.read(0, 0, images) is None
    assert store.problem == "No space left on device"
    assert list(store.folder.glob("*f32*")) == []


def test_without_room_epochs_are_not_stored(tmp_path: Path) -> None:
    images, logits = batch(0)
    rooms = iter([True, True, False, False, False, False])
    sizes: list[int] = []

    def has_room(size: int) -> bool:
        sizes.append(size)
        return next(rooms)

    store = LogitStore(tmp_path, KEY, batches=3, batch_size=4, classes=5, has_room=has_room)
    for epoch in range(4):
        store.write(epoch, 0, images, logits)
    assert [store.read(epoch, 0, images) is not None for epoch in range(4)] == [True, True, False, False]
    assert set(sizes) == {path.stat().st_size for path in store.folder.glob("*.f32")}
    assert store.problem == "there is not enough disk space, or --cache_limit is reached"


def test_the_digest_covers_all_weights_and_buffers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = digest_of_weights(network)
    assert digest_of_weights(network.to(memory_format=torch.channels_last)) == before
    network[1].running_mean[0] += 1e-6  # type: ignore[index, operator]
    assert digest_of_weights(network) != before


def top_store(folder: Path, top: int | None, classes: int = 12) -> LogitStore:
    return LogitStore(folder, KEY, batches=3, batch_size=4, classes=classes, top=top)


def test_the_largest_logits_keep_their_probabilities(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images, logits = torch.rand(4, 3, 16, 16, generator=generator), 5 * torch.randn(4, 12, generator=generator)
    store = top_store(tmp_path, 3)
    kept = store.write(0, 1, images, logits)
    values, indices = logits.topk(3, dim=1)
    torch.testing.assert_close(kept.gather(1, indices), values, rtol=0, atol=0)
    torch.testing.assert_close(kept.softmax(dim=1).gather(1, indices), logits.softmax(dim=1).gather(1, indices))
    # All others are equal.
    others = kept.scatter(1, indices, torch.nan)
    assert all(len(set(row[~row.isnan()].tolist())) == 1 for row in others)
    # Reading returns identical logits.
    stored = top_store(tmp_path, 3).read(0, 1, images)
    assert stored is not None
    torch.testing.assert_close(stored, kept, rtol=0, atol=0)
    # KL divergence at a temperature of 4, with numpy.
    unnormalized = (np.exp(each.numpy() / 4) for each in (logits, kept))
    exact, approximate = (each / each.sum(axis=1, keepdims=True) for each in unnormalized)
    assert store.divergence == pytest.approx((exact * np.log(exact / approximate)).sum(axis=1).mean(), rel=1e-4)


def test_each_number_of_kept_logits_has_its_own_folder_and_file_size(tmp_path: Path) -> None:
    images, logits = torch.rand(4, 3, 16, 16), torch.randn(4, 12)
    stores = [top_store(tmp_path, top) for top in (None, 2, 3)]
    assert len({store.folder for store in stores}) == 3
    for store in stores:
        store.write(0, 0, images, logits)
    sizes = [next(store.folder.glob("*.f32")).stat().st_size for store in stores]
    assert sizes == [4 * 3 * (4 * width + 2) for width in (12, 5, 7)]
    # Keeping 6 of 12 would save no space, so that all are kept.
    everything = top_store(tmp_path, 6)
    assert (everything.top, everything.folder) == (None, stores[0].folder)
    torch.testing.assert_close(everything.write(1, 0, images, logits), logits, rtol=0, atol=0)


def test_extreme_logits_are_finite_if_the_largest_are_kept(tmp_path: Path) -> None:
    logits = torch.zeros(2, 12)
    logits[:, 0], logits[1, 1:] = 1e4, -1e4
    kept = top_store(tmp_path, 2).write(0, 0, torch.rand(2, 3, 16, 16), logits)
    assert torch.isfinite(kept).all()
    torch.testing.assert_close(kept[0, :2], logits[0, :2])
