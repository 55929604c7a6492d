"""Image files are recognized by their content, and read again only if they may have changed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kd.data import LabeledImages, examine, manifest, read_folder
from kd.files import content_digest
from tests.conftest import write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", [(20, 16)] * 3)


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[LabeledImages, int]]:
    """Examine a folder as hours later, without the sample; return its images and the number of files read."""
    monkeypatch.setattr(manifest, "_SAMPLE", 0)
    monkeypatch.setattr(manifest, "_CLOCK_NS", 0)

    def run(folder: Path, verify: str = "sample") -> tuple[LabeledImages, int]:
        counts = [0]
        images, _ = examine(
            read_folder(folder),
            cache=tmp_path / "examined",
            verify=verify,
            progress=lambda done, _: counts.__setitem__(0, done),
        )
        return images, counts[0]

    return run


def test_unchanged_files_are_read_once(folder: Path, read: Callable[..., tuple[LabeledImages, int]]) -> None:
    images, count = read(folder)
    assert count == len(images) == 6
    assert images.digests is not None
    assert [digest.tobytes() for digest in images.digests] == [content_digest(f.read_bytes()) for f in images.files]
    again, count = read(folder)
    assert count == 0
    assert again.fingerprint == images.fingerprint == read_folder(folder).fingerprint
    assert read(folder, "full")[1] == 6


def test_only_new_and_changed_files_are_read(folder: Path, read: Callable[..., tuple[LabeledImages, int]]) -> None:
    before, _ = read(folder)
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / "new.png")
    after, count = read(folder)
    assert count == 1
    assert after.fingerprint != before.fingerprint
    # Other content with the size and time of the file before.
    changed = folder / "bee" / "1.png"
    facts = changed.stat()
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    os.utime(changed, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    images, count = read(folder)
    assert count == 1
    assert images.digests is not None
    assert images.digests[images.files.index(changed)].tobytes() == content_digest(changed.read_bytes())


def test_exchanged_class_folders_are_noticed(folder: Path, read: Callable[..., tuple[LabeledImages, int]]) -> None:
    before, _ = read(folder)
    for source, target in (("ant", "other"), ("bee", "ant"), ("other", "bee")):
        (folder / source).rename(folder / target)
    assert read(folder)[0].fingerprint != before.fingerprint


def test_a_copy_of_a_folder_has_its_fingerprint(
    folder: Path, tmp_path: Path, read: Callable[..., tuple[LabeledImages, int]]
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert read(folder)[0].fingerprint == read(tmp_path / "copy")[0].fingerprint


def test_a_sample_of_unchanged_files_is_verified(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_CLOCK_NS", 0)
    cache = tmp_path / "examined"
    examine(read_folder(folder), cache=cache)
    # As a file system that doesn't record changes.
    unchanged = manifest._read_stats([str(path) for path in read_folder(folder).files])
    monkeypatch.setattr(manifest, "_read_stats", lambda _: unchanged.copy())
    (folder / "ant" / "0.png").write_bytes((folder / "bee" / "0.png").read_bytes())
    images, _ = examine(read_folder(folder), cache=cache)
    assert images.fingerprint == read_folder(folder).fingerprint


def test_a_file_that_has_just_changed_is_read_again(folder: Path, tmp_path: Path) -> None:
    cache, counts = tmp_path / "examined", list[int]()
    for _ in range(2):
        examine(read_folder(folder), cache=cache, progress=lambda done, _: counts.append(done))
    assert counts == [6, 6]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text"])
def test_a_damaged_manifest_is_ignored(folder: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "examined"
    before, _ = examine(read_folder(folder), cache=cache)
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": bytes(content[:-30]), "flipped": bytes(content), "text": b"[]"}[damage])
    assert examine(read_folder(folder), cache=cache)[0].fingerprint == before.fingerprint
