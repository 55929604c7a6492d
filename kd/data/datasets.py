"""Data sets that go by name: folders of a person's own, torchvision's, and the digits that scikit-learn bundles."""

import dataclasses
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision import datasets

from kd.data.folders import read_folder, read_splits
from kd.data.images import LabeledImages, Splits
from kd.data.shards import read_shards, read_validation_shards
from kd.errors import UserError
from kd.registry import Registry

SHARDS = "webdataset"
Reader = Callable[..., Splits]
DATASETS: Registry[Reader] = Registry("data set")
"""Data sets by name: a function of the folder that holds it, and of ``download``."""


def cache_dir() -> Path:
    """Return the folder for data that the program fetches or makes: ``$KD_CACHE``, or ``kd`` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("KD_CACHE") or Path(home) / "kd")


def load_splits(
    dataset: str = "imagefolder",
    data_dir: str | Path | None = None,
    *,
    train_data: str = "train",
    val_data: str = "val",
    download: bool = False,
) -> Splits:
    """Read a data set.

    Args:
        dataset: ``imagefolder``, ``webdataset`` (sharded archives), or a name from :data:`DATASETS`.
        data_dir: Folder that holds it; ``None`` is a cache folder for the data sets that go by name.
        train_data: Folder of training images within ``data_dir`` (imagefolder, webdataset).
        val_data: Folder of validation images within ``data_dir`` (imagefolder, webdataset).
        download: Download a data set that goes by name if it is not there.

    Raises:
        UserError: If the data are not there, or not as they should be.
    """
    if dataset == "imagefolder":
        if data_dir is None:
            raise UserError("which images? --data_dir names their folder, or --dataset a data set such as digits")
        return read_splits(data_dir, train_data=train_data, val_data=val_data)
    if dataset == SHARDS:
        if data_dir is None:
            raise UserError(f"--dataset {SHARDS}: --data_dir names the folder of the shards")
        return read_shards(data_dir, train_data=train_data, val_data=val_data, cache=cache_dir() / "shards")
    try:
        reader = DATASETS[dataset]
    except UserError as error:
        raise UserError(f"--dataset {dataset}: {error}") from None
    root = Path(data_dir).expanduser() if data_dir is not None else cache_dir() / dataset
    if dataset != "digits" and not download and not root.is_dir():
        ways = "--download fetches it, --data_dir names another"
        raise UserError(f"--dataset {dataset}: there is no folder {root}; {ways}")
    lock = cache_dir() / f"{dataset}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        if dataset == "digits" or download:
            root.mkdir(parents=True, exist_ok=True)
        # One process fetches, the others of this machine wait for it.
        with FileLock(lock):
            return reader(root, download=download)
    except OSError as error:
        raise UserError(f"--dataset {dataset}: {error}") from None


@DATASETS.register("digits")
def digits(root: Path, *, download: bool = False) -> Splits:  # noqa: ARG001 (bundled: there is nothing to download)
    """Read the 1,797 handwritten digits of 8x8 pixels that scikit-learn bundles, one in five for validation.

    They are written once as a folder of PNGs, so that they go the way of anybody's images.

    Source: Alpaydin & Kaynak (1998), https://archive.ics.uci.edu/dataset/80
    """
    folder = root / "digits"
    if not folder.is_dir():
        from sklearn.datasets import load_digits

        bunch = load_digits()
        beside = Path(tempfile.mkdtemp(dir=root))
        for index, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
            path = beside / ("val" if index % 5 == 0 else "train") / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Their grays are 0 to 16.
            Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)
        try:
            beside.replace(folder)
        except OSError:
            shutil.rmtree(beside)
            if not folder.is_dir():
                raise
    return read_splits(folder)


def _imagenette(root: Path, *, download: bool, size: str, name: str) -> Splits:
    train, _ = _from_torchvision(datasets.Imagenette, root, ("train", "val"), download=download, size=size)
    # torchvision keeps the folder to itself; its list of images tells it.
    splits = read_splits(Path(train._samples[0][0]).parents[2])  # noqa: SLF001
    names = dict(zip(train.wnids, (names[0] for names in train.classes), strict=True))
    classes = tuple(names[wnid] for wnid in splits.classes)
    return Splits(name, *(_renamed(images, classes) for images in (splits.train, splits.val)))


def _renamed(images: LabeledImages, classes: tuple[str, ...]) -> LabeledImages:
    return dataclasses.replace(images, classes=classes)


def _in_memory(root: Path, *, download: bool, kind: type[Any], name: str) -> Splits:
    halves = []
    for split, one in zip(
        ("train", "val"), _from_torchvision(kind, root, (True, False), download=download), strict=True
    ):
        pixels = torch.as_tensor(one.data)
        is_gray = pixels.ndim == len(("N", "H", "W"))
        pixels = pixels[:, None].expand(-1, 3, -1, -1) if is_gray else pixels.permute(0, 3, 1, 2)
        halves.append(
            LabeledImages(
                classes=tuple(one.classes),
                labels=[int(label) for label in one.targets],
                keys=[f"{split}/{index}" for index in range(len(pixels))],
                load=functools.partial(_pixels_at, pixels),
                fingerprint=hashlib.blake2b(np.ascontiguousarray(one.data).data, digest_size=16).hexdigest(),
            )
        )
    return Splits(name, *halves)


def _pixels_at(pixels: Tensor, index: int) -> Tensor:
    return pixels[index]


def _from_torchvision(
    kind: type[Any], root: Path, splits: Sequence[str | bool], *, download: bool, **options: str
) -> tuple[Any, Any]:
    key = "split" if kind is datasets.Imagenette else "train"
    try:
        first, second = (kind(root=root, download=download, **{key: split}, **options) for split in splits)
    except (RuntimeError, OSError) as error:
        if download:
            raise UserError(f"{kind.__name__} could not be downloaded into {root}: {error}") from None
        raise UserError(f"{kind.__name__} is not in {root}; --download fetches it, --data_dir names another") from None
    return first, second


for _name, _size in (("imagenette", "full"), ("imagenette_320px", "320px"), ("imagenette_160px", "160px")):
    DATASETS.register(_name)(functools.partial(_imagenette, size=_size, name=_name))
for _name, _kind in (
    ("mnist", datasets.MNIST),
    ("fashion_mnist", datasets.FashionMNIST),
    ("cifar10", datasets.CIFAR10),
    ("cifar100", datasets.CIFAR100),
):
    DATASETS.register(_name)(functools.partial(_in_memory, kind=_kind, name=_name))


def validation_images(
    dataset: str, data_dir: str | None, val_data: str = "val", *, download: bool = False
) -> LabeledImages:
    """Read validation images alone.

    Args:
        dataset: ``imagefolder``, ``webdataset``, or a data set by name.
        data_dir: Its folder; for imagefolder either one that holds ``val_data``, or one of class folders.
        val_data: Name of the folder of validation images within ``data_dir``.
        download: Download a data set that goes by name if it is not there.

    Raises:
        UserError: If they can't be had.
    """
    if dataset == SHARDS and data_dir is not None:
        return read_validation_shards(data_dir, val_data, cache=cache_dir() / "shards")
    if dataset != "imagefolder" or data_dir is None:
        return load_splits(dataset, data_dir, download=download).val
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir}: there is no such folder")
    return read_folder(root / val_data if (root / val_data).is_dir() else root)
