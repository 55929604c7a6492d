"""Data sets of Hugging Face: by name, in a folder of ``save_to_disk``, or in Parquet files."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kd.data.folders import load_image
from kd.data.images import LabeledImages, Splits
from kd.data.splits import Layout
from kd.data.tables import TEST, TRAIN, VAL
from kd.errors import UserError
from kd.files import DIGEST_SIZE, content_digest

HUGGING_FACE = "hf:"
"""Prefix of the names of these data sets."""

_SPLITS = {TRAIN: ("train",), VAL: ("validation", "valid", "val", "dev"), TEST: ("test",)}
_SAVED = ("dataset_dict.json", "state.json")


def read_hugging_face(name: str, layout: Layout, *, download: bool = False) -> Splits:
    """Read a data set of Hugging Face.

    Args:
        name: A name on the hub, ``OWNER/NAME``, also with a configuration, ``OWNER/NAME:CONFIGURATION``; or a folder of
            ``save_to_disk`` or of Parquet files.
        layout: ``path_column`` and ``label_column`` are those of images and classes; ``None``: the first of their kind.
        download: Whether to download a data set that isn't in the cache of Hugging Face.

    Raises:
        UserError: If it can't be loaded, or has no images with one class each.
    """
    flag = f"--dataset {HUGGING_FACE}{name}"
    parts = _load(name, flag, download=download)
    found = {role: next((parts[split] for split in splits if split in parts), None) for role, splits in _SPLITS.items()}
    if not parts:
        raise UserError(f"{flag}: this folder holds neither a data set of save_to_disk nor Parquet files")
    if found[TRAIN] is None:
        raise UserError(f"{flag}: has no split train; its splits: {', '.join(parts)}")
    images = {role: _images(part, layout, flag, prefix=f"{role}/") for role, part in found.items() if part is not None}
    if any(each.classes != images[TRAIN].classes for each in images.values()):
        raise UserError(f"{flag}: its splits have different classes")
    val = images.get(VAL)
    # As elsewhere, the test images serve for validation where there are no others.
    if val is None and layout.val_fraction is None:
        val = images.pop(TEST, None)
    val = images[TRAIN].subset([]) if val is None else val
    return Splits(Path(name).name, images[TRAIN], val, test=images.get(TEST))


def _load(name: str, flag: str, *, download: bool) -> Mapping[str, Any]:
    """Return the splits of a data set by name."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{flag}: needs the package datasets: pip install datasets") from None
    folder = Path(name).expanduser()
    try:
        if any((folder / file).is_file() for file in _SAVED):
            loaded = datasets.load_from_disk(str(folder))
            return loaded if isinstance(loaded, Mapping) else {"train": loaded}
        if folder.is_dir():
            files: dict[str, list[str]] = {}
            for path in sorted(folder.rglob("*.parquet")):
                files.setdefault(_split_of(path), []).append(str(path))
            return {split: datasets.Dataset.from_parquet(paths) for split, paths in files.items()}
        repository, _, configuration = name.partition(":")
        mode = datasets.DownloadConfig(local_files_only=not download)
        loaded = datasets.load_dataset(repository, configuration or None, download_config=mode)
    except Exception as error:  # noqa: BLE001 (datasets and the hub raise whatever they meet)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "" if download or folder.is_dir() else "; download it with --download"
        raise UserError(f"{flag}: can't be loaded: {reason}{hint}") from None
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _split_of(path: Path) -> str:
    """Return the split of a Parquet file by its name, such as ``train-00000-of-00002.parquet``, or its folder's."""
    known = {word: splits[0] for splits in _SPLITS.values() for word in splits}
    return next((known[word] for word in (path.stem.partition("-")[0], path.parent.name) if word in known), "train")


def _images(data: Any, layout: Layout, flag: str, *, prefix: str) -> LabeledImages:  # noqa: ANN401 (a data set)
    import datasets

    features = data.features
    pictures = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    named = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    column = layout.path_column or next(iter(pictures), None)
    labels = next(iter([*layout.label_column, *named]), "label" if "label" in features else None)
    for setting, value in (("path_column", column), ("label_column", labels)):
        if value not in features:
            kind = "images" if setting == "path_column" else "classes"
            raise UserError(
                f"{flag}: no column of {kind}; its columns: {', '.join(features)}; name it with --{setting}"
            )
    values = data[labels]
    if isinstance(features[labels], datasets.ClassLabel):
        classes = tuple(features[labels].names)
        numbers = list(map(int, values))
    else:
        classes = tuple(sorted({str(value) for value in values}))
        numbers = [classes.index(str(value)) for value in values]
    if min(numbers, default=0) < 0:
        raise UserError(f"{flag}: {sum(number < 0 for number in numbers):,} images of {prefix[:-1]} have no label")
    encoded = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    load = _Encoded(encoded, str(column), prefix, layout.pixel_range)
    digests = b"".join(content_digest(load.read(index)) for index in range(len(encoded)))
    return LabeledImages(
        classes,
        numbers,
        [f"{prefix}{index}" for index in range(len(encoded))],
        load,
        digests=np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_SIZE),
        pixel_range=layout.pixel_range,
    )


class _Encoded:
    """Reads the encoded images of a data set of Hugging Face, and decodes them as those in files."""

    def __init__(self, data: Any, column: str, prefix: str, pixel_range: tuple[float, ...]) -> None:  # noqa: ANN401
        self._data, self._column, self._prefix, self._pixel_range = data, column, prefix, pixel_range

    def read(self, index: int) -> bytes:
        """Return an image file's content."""
        image = self._data[index][self._column]
        content: bytes = image["bytes"] or Path(image["path"]).read_bytes()
        return content

    def __call__(self, index: int) -> Tensor:
        """Return the pixels ``(3, H, W)``, uint8."""
        return load_image(io.BytesIO(self.read(index)), f"{self._prefix}{index}", pixel_range=self._pixel_range)
