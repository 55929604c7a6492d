"""Data sets by name: image folders, sharded archives, torchvision's data sets, and scikit-learn's digits."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torchvision import datasets

from kd.data.folders import read_folder, read_splits
from kd.data.images import LabeledImages, Splits
from kd.data.shards import read_shards, read_validation_shards
from kd.errors import UserError
from kd.files import content_digest
from kd.registry import Registry

SHARDS = "webdataset"
_REMEDY = "download it with --download, or set --data_dir"
DATASETS: Registry[Callable[..., Splits]] = Registry("data set")
"""Data sets by name: functions of the folder of the data set and of ``download``."""


def cache_dir() -> Path:
    """Return the folder for downloaded and computed data: ``$KD_CACHE``, or ``kd`` in the user's cache folder."""
    if given := os.environ.get("KD_CACHE"):
        return Path(given)
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UserError("there is no home directory for the caches; set KD_CACHE to a folder") from None
    return Path(home) / "kd"


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
        dataset: ``imagefolder``, ``webdataset`` (sharded archives), or a name in `DATASETS`.
        data_dir: Folder of the data set; for those in `DATASETS`, ``None`` selects one in `cache_dir`.
        train_data: Folder of training images within ``data_dir``; for webdataset also a pattern of shards.
        val_data: Folder of validation images likewise.
        download: Whether to download a data set in `DATASETS` that is missing.

    Raises:
        UserError: If the data set is missing or invalid.
    """
    if dataset in ("imagefolder", SHARDS):
        if data_dir is None:
            raise UserError(f"--dataset {dataset}: set --data_dir to the folder of the images")
        if dataset == SHARDS:
            return read_shards(data_dir, train_data=train_data, val_data=val_data, cache=cache_dir() / "shards")
        return read_splits(data_dir, train_data=train_data, val_data=val_data)
    try:
        reader = DATASETS[dataset]
    except UserError as error:
        raise UserError(f"--dataset {dataset}: {error}") from None
    root = Path(data_dir).expanduser() if data_dir is not None else cache_dir() / dataset
    download = download or dataset == "digits"
    if not download and not root.is_dir():
        raise UserError(f"--dataset {dataset}: there is no folder {root}; {_REMEDY}")
    lock = cache_dir() / f"{dataset}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        if download:
            root.mkdir(parents=True, exist_ok=True)
        # Of several processes on a machine, one downloads, and the others wait.
        with FileLock(lock):
            return reader(root, download=download)
    except OSError as error:
        raise UserError(f"--dataset {dataset}: {error}") from None


def validation_images(
    dataset: str, data_dir: str | None, val_data: str = "val", *, download: bool = False
) -> LabeledImages:
    """Read only the validation images, as `load_splits`; for imagefolder, ``data_dir`` may hold the class folders."""
    if dataset == SHARDS and data_dir is not None:
        return read_validation_shards(data_dir, val_data, cache=cache_dir() / "shards")
    if dataset != "imagefolder" or data_dir is None:
        return load_splits(dataset, data_dir, download=download).val
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir}: there is no such folder")
    return read_folder(root / val_data if (root / val_data).is_dir() else root)


@DATASETS.register("digits")
def digits(root: Path, *, download: bool = False) -> Splits:  # noqa: ARG001 (nothing to download)
    """Read scikit-learn's 1,797 digits of 8x8 pixels, written once as PNG files; one in five is for validation.

    Source: Alpaydin & Kaynak (1998), https://archive.ics.uci.edu/dataset/80
    """
    folder = root / "digits"
    if not folder.is_dir():
        from sklearn.datasets import load_digits

        bunch = load_digits()
        temporary = Path(tempfile.mkdtemp(dir=root))
        for index, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
            path = temporary / ("val" if index % 5 == 0 else "train") / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Gray levels from 0 to 16.
            Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)
        temporary.replace(folder)
    return read_splits(folder)


def _imagenette(root: Path, *, download: bool, size: str, name: str) -> Splits:
    train = _from_torchvision(datasets.Imagenette, root, download, split="train", size=size)
    # The folder's attribute is private in torchvision, so it is taken from the path of an image.
    splits = read_splits(Path(train._samples[0][0]).parents[2])  # noqa: SLF001
    words = {wnid: synonyms[0] for wnid, synonyms in zip(train.wnids, train.classes, strict=True)}
    classes = tuple(words[wnid] for wnid in splits.classes)
    return Splits(name, *(replace(images, classes=classes) for images in (splits.train, splits.val)))


def _in_memory(root: Path, *, download: bool, kind: type[Any], name: str) -> Splits:
    halves = []
    for half in ("train", "val"):
        data = _from_torchvision(kind, root, download, train=half == "train")
        pixels = torch.as_tensor(data.data)
        is_gray = pixels.ndim == len(("N", "H", "W"))
        pixels = pixels[:, None].expand(-1, 3, -1, -1) if is_gray else pixels.permute(0, 3, 1, 2)
        labels, keys = list(map(int, data.targets)), [f"{half}/{index}" for index in range(len(pixels))]
        contents = np.ascontiguousarray(data.data)
        digests = np.frombuffer(b"".join(content_digest(each.data) for each in contents), dtype=np.uint8)
        load = partial(torch.select, pixels, 0)
        halves.append(LabeledImages(tuple(data.classes), labels, keys, load, digests=digests.reshape(-1, 16)))
    return Splits(name, *halves)


def _from_torchvision(kind: type[Any], root: Path, download: bool, **options: str | bool) -> Any:  # noqa: ANN401, FBT001
    try:
        return kind(root=root, download=download, **options)
    except (RuntimeError, OSError) as error:
        if download:
            raise UserError(f"--download: {kind.__name__} could not be downloaded into {root}: {error}") from None
        raise UserError(f"{root}: {kind.__name__} is not in this folder; {_REMEDY}") from None


for _name, _size in (("imagenette", "full"), ("imagenette_320px", "320px"), ("imagenette_160px", "160px")):
    DATASETS.register(_name)(partial(_imagenette, size=_size, name=_name))
_KINDS = (datasets.MNIST, datasets.FashionMNIST, datasets.CIFAR10, datasets.CIFAR100)
for _name, _kind in zip(("mnist", "fashion_mnist", "cifar10", "cifar100"), _KINDS, strict=True):
    DATASETS.register(_name)(partial(_in_memory, kind=_kind, name=_name))
