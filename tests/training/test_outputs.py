"""The store of a teacher's logits: what was put in comes out, and nothing else does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd.training import LogitStore, digest_of_weights

KEY: dict[str, Any] = {"teacher": "a", "views": ["crop", 0]}


def open_store(folder: Path, **more: Any) -> LogitStore:
    return LogitStore(folder, KEY | more, batches=3, batch_size=4, classes=5)


def batch(seed: int, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 16, generator=generator), torch.randn(count, 5, generator=generator)


@pytest.mark.parametrize("count", [4, 2])
def test_what_was_written_is_read_by_another_run(tmp_path: Path, count: int) -> None:
    images, logits = batch(0, count)
    open_store(tmp_path).write(7, 2, images, logits)
    again = open_store(tmp_path)
    stored = again.read(7, 2, images)
    assert stored is not None
    torch.testing.assert_close(stored, logits, rtol=0, atol=0)
    assert again.read_batches == 1


def test_half_precision_is_kept_to_the_bit(tmp_path: Path) -> None:
    images, logits = batch(0)
    open_store(tmp_path).write(0, 0, images, logits.bfloat16())
    stored = open_store(tmp_path).read(0, 0, images)
    assert stored is not None
    torch.testing.assert_close(stored, logits.bfloat16().float(), rtol=0, atol=0)


def test_what_is_not_there_is_not_read(tmp_path: Path) -> None:
    images, logits = batch(0)
    store = open_store(tmp_path)
    store.write(0, 1, images, logits)
    assert store.read(0, 0, images) is None
    assert store.read(1, 1, images) is None
    # Other images in this place: another order, another view, a resume that began elsewhere.
    assert store.read(0, 1, batch(1)[0]) is None
    assert store.read(0, 1, images[:2]) is None
    assert store.read(0, 1, images) is not None
    assert open_store(tmp_path, teacher="b").read(0, 1, images) is None


@pytest.mark.parametrize("at", [0, 4 * 3 * 4 * 5])
def test_what_is_half_written_is_not_read(tmp_path: Path, at: int) -> None:
    images, logits = batch(0)
    store = open_store(tmp_path)
    store.write(0, 0, images, logits)
    (file,) = store.folder.glob("*.f32")
    content = np.fromfile(file, dtype=np.uint8)
    content[at] ^= 1
    content.tofile(file)
    assert open_store(tmp_path).read(0, 0, images) is None


def test_a_full_disk_ends_the_writing_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 3 * 4 * 3 * (4 * 5 + 1)

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    images, logits = batch(0)
    store = LogitStore(tmp_path, KEY, batches=3, batch_size=4, classes=5, share=0.7)
    for epoch in range(4):
        store.write(epoch, 0, images, logits)
    assert [store.read(epoch, 0, images) is not None for epoch in range(4)] == [True, True, False, False]


def test_the_digest_is_that_of_all_weights_and_statistics() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = digest_of_weights(network)
    assert digest_of_weights(network.to(memory_format=torch.channels_last)) == before
    network[1].running_mean[0] += 1e-6  # type: ignore[index, operator]
    assert digest_of_weights(network) != before
