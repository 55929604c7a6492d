"""Writing an image folder as sharded archives."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from kd.data.images import LabeledImages, Splits
from kd.data.samples import LABEL, import_webdataset
from kd.data.shard_index import INDEX_FILE, describe, write_index
from kd.data.shards import CLASSES_FILE
from kd.errors import UserError
from kd.randomness import derive_seed


def write_shards(
    splits: Splits,
    output: Path,
    *,
    per_shard: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, int]:
    """Write the image files of a data set, unchanged, into shards with an index; return the numbers of shards.

    The folder contains ``train/000000.tar``, ..., ``val/000000.tar``, ..., ``classes.txt`` and ``index.json``. It is
    written under a temporary name, then renamed. Both splits are shuffled; the same files and seed give the same bytes.
    ``progress`` is called after each image with the number of images written and their total.
    """
    import_webdataset()
    if per_shard < 1:
        raise UserError(f"--per_shard {per_shard}: must be at least 1")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: this already exists; choose another folder, or remove it")
    temporary = output.with_name(f"{output.name}.part")
    total, written = len(splits.train) + len(splits.val), itertools.count(1)
    index = {}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for name, images in (("train", splits.train), ("val", splits.val)):
            if not images.files:
                raise UserError(f"{splits.name}: these images don't come from files; shard an image folder")
            paths = _write(images, temporary / name, per_shard, seed, lambda: progress(next(written), total))
            shards = [(f"{name}/{path.name}", path) for path in paths]
            index[name] = describe(shards, classes=len(splits.classes), labeled=name == "val")
        (temporary / CLASSES_FILE).write_text("".join(f"{name}\n" for name in splits.classes), encoding="utf-8")
        write_index(index, temporary / INDEX_FILE)
        temporary.replace(output)
    except OSError as error:
        raise UserError(f"{output}: the shards can't be written: {error}") from None
    return {name: len(split["shards"]) for name, split in index.items()}


def _write(images: LabeledImages, folder: Path, per_shard: int, seed: int, count: Callable[[], object]) -> list[Path]:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(derive_seed(seed, "shards", folder.name))
    used: set[str] = set()
    with import_webdataset().ShardWriter(
        f"{str(folder).replace('%', '%%')}/%06d.tar",
        maxcount=per_shard,
        maxsize=float("inf"),
        verbose=0,
        # Files are stored unchanged, without modification times, and names may be long.
        encoder=False,
        mtime=0,
        format="PAX_FORMAT",
    ) as writer:
        for index in torch.randperm(len(images), generator=generator).tolist():
            path = images.files[index]
            sample = {"__key__": _key(images.keys[index], used), LABEL: str(images.labels[index]).encode()}
            writer.write(sample | {path.suffix.removeprefix("."): path.read_bytes()})
            count()
    return sorted(folder.glob("*.tar"))


def _key(path: str, used: set[str]) -> str:
    """Return a unique path without its suffix and dots, as webdataset ends a key at the first dot of the file name.

    Example:
        >>> used = set()
        >>> [_key(path, used) for path in ("ant/1.jpg", "ant/1.png", "ant/a.b.jpg")]
        ['ant/1', 'ant/1-2', 'ant/a_b']
    """
    stem = Path(path).with_suffix("")
    plain = stem.with_name(stem.name.replace(".", "_")).as_posix()
    keys = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
    key = next(key for key in keys if key not in used)
    used.add(key)
    return key
