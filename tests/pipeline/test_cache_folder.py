"""The cache folder has a limit, and is listed, verified and cleared."""

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from kd.cli import experiment, main
from kd.pipeline.cache_folder import cache_entries, make_room
from tests.conftest import MakeFolder

FLAGS = (
    "--image_size 16 --batch_size 8 --accelerator cpu --teacher_model convnet(widths=[6]) --student_model linear "
    "--max_epochs 2 --allow_weak_teacher --train_teacher --distill"
)


def add_entry(name: str, *, size: int, age: float) -> Path:
    """Write a cache entry that was last used ``age`` seconds before the program started."""
    path = Path(os.environ["KD_CACHE"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    used = time.time() - 86400 - age
    os.utime(path, (used, used))
    return path.parent


def train(folder: Path, *more: str) -> None:
    assert experiment(["--data_dir", str(folder), *FLAGS.split(), *more]) == 0


def kinds() -> set[str]:
    return {entry.kind for entry in cache_entries()}


def test_the_least_recently_used_entries_make_room() -> None:
    oldest, newest = add_entry("logits/a/0.f32", size=60, age=9), add_entry("logits/b/0.f32", size=30, age=1)
    middle = add_entry("decoded/c/pixels.u8", size=50, age=5)
    assert make_room(10, limit=150)
    assert oldest.exists()
    assert make_room(50, limit=130)
    assert not oldest.exists()
    assert middle.exists()
    # Too large whatever is removed: nothing is.
    assert not make_room(131, limit=130)
    assert [entry.path for entry in cache_entries()] == [newest, middle]


def test_entries_in_use_are_kept() -> None:
    used = add_entry("logits/a/0.f32", size=60, age=0)
    os.utime(used / "0.f32")
    assert not make_room(60, limit=100)
    assert used.exists()


def test_an_experiment_keeps_its_caches_within_the_limit(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, earlier = make_folder(), add_entry("logits/a/0.f32", size=10**6, age=0)
    train(folder, "--cache_limit", "0.001")
    assert not earlier.exists()
    assert kinds() == {"decoded", "logits", "examined"}
    assert sum(entry.size for entry in cache_entries()) < 10**6
    assert "--cache_limit" not in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert cache_entries() == []
    train(folder, "--cache_limit", "1e-6", "--name", "again")
    assert not list(Path(os.environ["KD_CACHE"]).glob("*/*/*.[fu]*"))
    output = " ".join(capsys.readouterr().out.split())
    assert re.search(r"decoded images aren't cached, .* --cache_limit is reached", output)
    assert re.search(r"not all of the teacher's logits are stored: .* --cache_limit is reached", output)


def test_damage_is_counted_and_computed_again(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder()
    train(folder)
    assert all(damaged == 0 for _, damaged in (entry.verify() for entry in cache_entries()))
    for entry in cache_entries():
        for path in entry.path.glob("*.f32") if entry.kind == "logits" else entry.path.glob("pixels.u8"):
            content = np.fromfile(path, dtype=np.uint8)
            content[0] ^= 1
            content.tofile(path)
        if entry.kind == "examined":
            entry.path.write_bytes(entry.path.read_bytes()[:-100])
    damages = {entry.kind: entry.verify() for entry in cache_entries()}
    assert {kind: damaged for kind, (_, damaged) in damages.items()} == {"decoded": 1, "logits": 2, "examined": 1}
    capsys.readouterr()
    assert main(["cache", "verify"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"logits .* 2 ", output)
    assert re.search(r"\d entries, 0\.00 GB in ", output)
    train(folder, "--name", "again")
    assert all(damaged == 0 for _, damaged in (entry.verify() for entry in cache_entries()))


def test_a_cache_without_its_pixels_is_written_again(make_folder: MakeFolder) -> None:
    folder = make_folder()
    train(folder)
    (pixels, *_) = Path(os.environ["KD_CACHE"]).glob("decoded/*/pixels.u8")
    size = pixels.stat().st_size
    pixels.unlink()
    train(folder, "--name", "again")
    assert pixels.stat().st_size == size
