"""Data sets by name: image folders, sharded archives, torchvision's data sets, and scikit-learn's digits."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision import datasets

from kd.data.division import SPLIT_FILE, apply_division, read_division
from kd.data.folders import Listing, read_folder
from kd.data.hugging_face import HUGGING_FACE, read_hugging_face
from kd.data.images import LabeledImages, Splits
from kd.data.shards import read_shards, read_validation_shards
from kd.data.splits import Layout, read_splits
from kd.data.tables import TRAIN
from kd.errors import UserError
from kd.files import DIGEST_SIZE, content_digest
from kd.registry import Registry
from kd.tables import SUFFIXES

SHARDS = "webdataset"
_REMEDY = "download it with --download, or set --data_dir"
# Where data sets of torchvision keep their files, or pairs of files and labels, and their labels.
_FILES = ("_image_files", "_images", "_samples", "samples")
_LABELS = ("_labels", "labels", "targets")
_DIGITS = 2
_DEPTH = 8
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
    layout: Layout | None = None,
    *,
    download: bool = False,
    recorded_in: Path | None = None,
) -> Splits:
    """Read a data set.

    Args:
        dataset: ``imagefolder`` (folders and tables), ``webdataset`` (sharded archives), ``hf:NAME`` (Hugging Face), or
            a name in `DATASETS`.
        data_dir: Folder of the data set; for those in `DATASETS`, ``None`` selects one in `cache_dir`.
        layout: Where the images of each split are. If they are to be divided, all are returned as training images,
            unless the division is recorded.
        download: Whether to download a data set that is missing.
        recorded_in: A folder within an experiment's, from which the recorded division of the images is taken.

    Raises:
        UserError: If the data set is missing or invalid.
    """
    layout = layout or Layout()
    splits = _load_undivided(dataset, data_dir, layout, download=download)
    if layout.divides and recorded_in is not None:
        files = [folder / SPLIT_FILE for folder in (recorded_in, *recorded_in.absolute().parents)[:_DEPTH]]
        known = next(filter(None, map(read_division, files)), {})
        splits = apply_division(splits, [known.get(key, TRAIN) for key in splits.train.keys])
    return splits


def _load_undivided(dataset: str, data_dir: str | Path | None, layout: Layout, *, download: bool) -> Splits:
    if dataset == SHARDS:
        if data_dir is None:
            raise UserError(f"--dataset {dataset}: set --data_dir to the folder of the images")
        return read_shards(
            data_dir,
            train_data=layout.train_data,
            val_data=layout.val_data,
            test_data=layout.test_data,
            cache=cache_dir() / "shards",
        )
    if dataset == "imagefolder":
        if data_dir is None and layout.train_data == Layout().train_data:
            raise UserError("--dataset imagefolder: set --data_dir to the folder of the images")
        return read_splits(data_dir, layout)
    splits = _load_by_name(dataset, data_dir, layout, download=download)
    if layout.val_fraction is not None:
        if splits.test is not None:
            raise UserError(f"--val_fraction {layout.val_fraction:g}: {dataset} has validation images of its own")
        # What is otherwise used for validation are the official test images.
        test = splits.val if len(splits.val) else None
        splits = replace(splits, val=splits.train.subset([]), test=test)
    if layout.test_fraction is not None and splits.test is not None:
        raise UserError(f"--test_fraction {layout.test_fraction:g}: {dataset} has test images of its own")
    if not len(splits.val) and layout.val_fraction is None:
        raise UserError(f"--dataset {dataset}: has no validation images; add --val_fraction 0.2")
    return splits


def _load_by_name(dataset: str, data_dir: str | Path | None, layout: Layout, *, download: bool) -> Splits:
    if dataset.startswith(HUGGING_FACE):
        return read_hugging_face(dataset.removeprefix(HUGGING_FACE), layout, download=download)
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
    dataset: str,
    data_dir: str | None,
    val_data: str = "val",
    *,
    download: bool = False,
    pixel_range: tuple[float, ...] = (),
    multilabel: bool = False,
) -> LabeledImages:
    """Read only the validation images, as `load_splits`.

    For imagefolder, ``val_data`` may be a table, and ``data_dir`` may hold the class folders.
    """
    layout = Layout(pixel_range=pixel_range, multilabel=multilabel)
    if dataset == SHARDS and data_dir is not None:
        return read_validation_shards(data_dir, val_data, cache=cache_dir() / "shards")
    if dataset != "imagefolder":
        return load_splits(dataset, data_dir, layout, download=download).val
    if Path(val_data).suffix.lower() in SUFFIXES:
        return read_splits(data_dir, replace(layout, train_data=val_data, val_data=val_data)).val
    root = Path(data_dir or ".").expanduser()
    if data_dir is None:
        raise UserError("--dataset imagefolder: set --data_dir to the folder of the images")
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir}: there is no such folder")
    return read_folder(root / val_data if (root / val_data).is_dir() else root, pixel_range=pixel_range)


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
        halves.append(_of_pixels(pixels, list(map(int, data.targets)), tuple(data.classes), f"{half}/"))
    return Splits(name, *halves)


@dataclass(frozen=True)
class _Official:
    """A data set of torchvision: its class, and the official split that serves as each of ours."""

    name: str
    kind: type[Any]
    train: str | None = "train"
    val: str | None = "test"
    test: str | None = None

    def __call__(self, root: Path, *, download: bool = False) -> Splits:
        """Read the data set."""
        splits = {
            role: _labeled(
                _from_torchvision(self.kind, root, download, **({} if split is None else {"split": split})), role
            )
            for role, split in (("train", self.train), ("val", self.val), ("test", self.test))
            if split is not None or role == "train"
        }
        return Splits(
            self.name, splits["train"], splits.get("val", splits["train"].subset([])), test=splits.get("test")
        )


def _labeled(data: Any, role: str) -> LabeledImages:  # noqa: ANN401 (a data set of torchvision)
    """Return the images of a data set of torchvision; most keep their files in attributes of these names."""
    files: Sequence[Any]
    files, labels = (
        next((getattr(data, name) for name in names if hasattr(data, name)), ()) for names in (_FILES, _LABELS)
    )
    first = next(iter(files), None)
    if isinstance(first, tuple):
        files, labels = [file for file, _ in files], [label for _, label in files]
    labels = [int(label) for label in labels]
    names = getattr(data, "classes", None) or [f"{label:0{_DIGITS}d}" for label in range(max(labels) + 1)]
    classes = tuple(map(str, names))
    if not files:
        return _of_pixels(torch.from_numpy(data.data), labels, classes, f"{role}/")
    paths = [Path(file) for file in files]
    # Paths below the folder of the data set, wherever that is.
    keys = [path.relative_to(data.root).as_posix() for path in paths]
    return Listing(str(data.root), paths, keys, [classes[label] for label in labels], classes).images(classes)


def _of_pixels(pixels: Tensor, labels: list[int], classes: tuple[str, ...], prefix: str) -> LabeledImages:
    """Return images in memory, ``(N, 3, H, W)``, uint8."""
    keys = [f"{prefix}{index}" for index in range(len(pixels))]
    digests = b"".join(content_digest(image.contiguous().numpy().data) for image in pixels)
    hashes = np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_SIZE)
    return LabeledImages(classes, labels, keys, partial(torch.select, pixels, 0), digests=hashes)


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
for _official in (
    _Official("flowers102", datasets.Flowers102, val="val", test="test"),
    _Official("oxford_pets", datasets.OxfordIIITPet, train="trainval"),
    _Official("food101", datasets.Food101),
    _Official("stl10", datasets.STL10),
    _Official("svhn", datasets.SVHN),
    _Official("eurosat", datasets.EuroSAT, train=None, val=None),
    _Official("gtsrb", datasets.GTSRB),
    _Official("dtd", datasets.DTD, val="val", test="test"),
    _Official("fgvc_aircraft", datasets.FGVCAircraft, val="val", test="test"),
):
    DATASETS.register(_official.name)(_official)
