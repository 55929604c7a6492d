"""Making sharded archives of an image folder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kd.data.images import LabeledImages, Splits
from kd.data.samples import LABEL, import_webdataset
from kd.data.shard_index import INDEX_FILE, describe, write_index
from kd.data.shards import CLASSES_FILE
from kd.errors import UserError
from kd.randomness import derive_seed

Progress = Callable[[int, int], None]
"""Told how many images are written, of how many."""


def write_shards(
    splits: Splits, output: Path, *, per_shard: int = 1000, seed: int = 0, progress: Progress | None = None
) -> dict[str, int]:
    """Write the files of a folder's images into archives, as they are, with an index.

    The images are shuffled by the seed, those of validation too: the first of them are of all classes. The folder is
    written beside its place and moved there. Written again from the same files, it is the same to the last byte.

    Args:
        splits: The images; each has a file.
        output: The folder to write: ``train/000000.tar``, ..., ``val/000000.tar``, ..., ``classes.txt`` and
            ``index.json``.
        per_shard: Images in an archive.
        seed: What the order hangs on.
        progress: Told how far it is.

    Returns:
        How many archives there are, by split.

    Raises:
        UserError: If the folder is there already, the images have no files, or it can't be written.
    """
    import_webdataset()
    if per_shard < 1:
        raise UserError(f"--per_shard must be at least 1, and is {per_shard}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: this is there already; name another folder, or remove it")
    beside = output.with_name(f"{output.name}.part")
    count = _Count(len(splits.train) + len(splits.val), progress)
    index = {}
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for name, images in (("train", splits.train), ("val", splits.val)):
            if not images.files:
                raise UserError(f"{splits.name}: these images are no files; shards are made of image folders")
            paths = _write(images, beside / name, per_shard=per_shard, seed=seed, count=count)
            shards = [(f"{name}/{path.name}", path) for path in paths]
            index[name] = describe(shards, classes=len(splits.classes), labeled=name == "val")
        (beside / CLASSES_FILE).write_text("".join(f"{one}\n" for one in splits.classes), encoding="utf-8")
        write_index(index, beside / INDEX_FILE)
        beside.replace(output)
    except OSError as error:
        raise UserError(f"{output}: the shards can't be written: {error}") from None
    return {name: len(split["shards"]) for name, split in index.items()}


@dataclass
class _Count:
    """How many images are written.

    Args:
        total: Of how many.
        progress: Who is told.
    """

    total: int
    progress: Progress | None
    done: int = 0

    def one_more(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _write(images: LabeledImages, folder: Path, *, per_shard: int, seed: int, count: _Count) -> list[Path]:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(derive_seed(seed, "shards", folder.name))
    taken: set[str] = set()
    with import_webdataset().ShardWriter(
        f"{str(folder).replace('%', '%%')}/%06d.tar",
        maxcount=per_shard,
        maxsize=float("inf"),
        verbose=0,
        # Bytes stay as they are; times of change are left out, names may be long.
        encoder=False,
        mtime=0,
        format="PAX_FORMAT",
    ) as writer:
        for index in torch.randperm(len(images), generator=generator).tolist():
            path = images.files[index]
            sample = {"__key__": _key(images.keys[index], taken), LABEL: str(images.labels[index]).encode()}
            writer.write(sample | {path.suffix.removeprefix("."): path.read_bytes()})
            count.one_more()
    return sorted(folder.glob("*.tar"))


def _key(path: str, taken: set[str]) -> str:
    """Return an image's path without its ending; webdataset takes a name's first dot for its end.

    Example:
        >>> taken = set()
        >>> [_key(path, taken) for path in ("ant/1.jpg", "ant/1.png", "ant/a.b.jpg")]
        ['ant/1', 'ant/1-2', 'ant/a_b']
    """
    stem = Path(path).with_suffix("")
    key = plain = stem.with_name(stem.name.replace(".", "_")).as_posix()
    number = 1
    while key in taken:
        number += 1
        key = f"{plain}-{number}"
    taken.add(key)
    return key
