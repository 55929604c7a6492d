"""Shared fixtures: small folders of image files, and a temporary working directory for each test."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:
    # Parallel tests share the cores. Set before torch is imported, which reads the variable.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).parent.parent

MakeFolder = Callable[..., Path]

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(autouse=True)
def _isolated_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep outputs, caches and downloads in the test's temporary folder."""
    folder = tmp_path / "working_directory"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def chromium() -> str:
    """Return the path of Chromium; skip the test if it is not installed."""
    paths = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not paths:
        pytest.skip("no Chromium is installed")
    return paths[0]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that writes an image folder; the classes differ in color."""

    def make(
        name: str = "photos",
        *,
        classes: tuple[str, ...] = CLASSES,
        train: int = 8,
        val: int = 5,
        size: tuple[int, int] = (20, 16),
    ) -> Path:
        root = tmp_path / name
        generator = np.random.default_rng(0)
        for split, count in (("train", train), ("val", val)):
            for label, class_name in enumerate(classes):
                folder = root / split / class_name
                folder.mkdir(parents=True)
                for index in range(count):
                    pixels = generator.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
                    pixels[..., label % 3] += np.uint8(70 + 120 * (label // 3))
                    Image.fromarray(pixels).save(folder / f"{index}.png")
        return root

    return make


def write_images(root: Path, sizes: Sequence[tuple[int, int]], *, coarse: tuple[int, int] | None = None) -> Path:
    """Write two class folders of random images, one per size (width, height); upsampled from a coarse grid if given."""
    generator = np.random.default_rng(0)
    for label in ("ant", "bee"):
        folder = root / label
        folder.mkdir(parents=True)
        for index, size in enumerate(sizes):
            width, height = coarse or size
            image = Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
            image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return root
