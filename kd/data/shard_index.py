"""Number of images in each shard: read from an index beside the shards, or counted once and cached."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock
from xxhash import xxh3_128

from kd.data.samples import MARK_EVERY, Sample, Shard, read_samples
from kd.errors import UserError
from kd.files import write_text

INDEX_FILE = "index.json"
_VERSION = 1
_log = logging.getLogger(__name__)
_THREADS = 4


def count_images(
    root: Path, urls: Mapping[str, str], *, classes: int, cache: Path, labeled: bool
) -> tuple[tuple[Shard, ...], tuple[int, ...] | None]:
    """Return the shards at ``urls``, given by name, and the number of images of each class over all of them, if known.

    Both are read from the index in ``root``, or else counted and kept in ``cache``. With ``labeled``, the shards have
    the labels and keys of their images.
    """
    path = root / INDEX_FILE
    index = _read(path)
    try:
        for split in (index[name] for name in ("train", "val") if name in index):
            entries = {entry["name"]: entry for entry in split["shards"]}
            if urls.keys() <= entries.keys() and (not labeled or all("labels" in entries[name] for name in urls)):
                _check_index(path, urls, entries, split["counts"], classes=classes)
                shards = tuple(_shard(entries[name], url) for name, url in urls.items())
                # The counts of each class are those of all shards of the split.
                return shards, tuple(split["counts"]) if urls.keys() == entries.keys() else None
    except (KeyError, TypeError, ValueError, AttributeError):
        _log.warning("%s: this index is damaged; counting the shards again", path)
    remote = [url for url in urls.values() if not Path(url).is_file()]
    if remote:
        raise UserError(f"{remote[0]}: this remote shard is not in {path}; copy the index that kd shard wrote")
    split = _count_once(urls, classes=classes, cache=cache, labeled=labeled)
    return tuple(_shard(entry, urls[entry["name"]]) for entry in split["shards"]), tuple(split["counts"])


def describe(shards: Sequence[tuple[str, Path]], *, classes: int, labeled: bool) -> dict[str, Any]:
    """Return the index of a split, given the names and paths of its shards; with ``labeled``, with labels and keys."""

    def read(shard: tuple[str, Path]) -> list[Sample]:
        name, path = shard
        samples = list(read_samples(Shard(name, str(path), images=0), classes=classes, labels_only=True))
        if not samples:
            raise UserError(f"{path}: this shard has no samples (KEY.jpg and KEY.cls)")
        return samples

    counts = [0] * classes
    entries: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for (name, path), samples in zip(shards, threads.map(read, shards), strict=True):
            labels, marks = [sample.label for sample in samples], [sample.offset for sample in samples[::MARK_EVERY]]
            for label in labels:
                counts[label] += 1
            entry = {"name": name, "images": len(samples), "bytes": path.stat().st_size, "marks": marks}
            entry["digest"] = digest_of_file(path)
            entries.append(entry | ({"labels": labels, "keys": [each.key for each in samples]} if labeled else {}))
    return {"counts": counts, "shards": entries}


def digest_of_file(path: Path) -> str:
    """Return a hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxh3_128).hexdigest()


def write_index(splits: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the index of splits, from `describe`."""
    write_text(path, json.dumps({"version": _VERSION} | splits))


def _check_index(
    index: Path, urls: Mapping[str, str], entries: Mapping[str, Any], counts: Sequence[int], *, classes: int
) -> None:
    if len(counts) != classes:
        raise UserError(f"{index}: this index has {len(counts)} classes, but classes.txt has {classes}")
    for name, url in urls.items():
        path, expected = Path(url), entries[name]["bytes"]
        if path.is_file() and path.stat().st_size != expected:
            problem = f"this shard has {path.stat().st_size:,} bytes, but {index} says {expected:,}"
            raise UserError(f"{path}: {problem}; restore it, or write shards and index again with kd shard")


def _count_once(urls: Mapping[str, str], *, classes: int, cache: Path, labeled: bool) -> dict[str, Any]:
    """Return the index of a split whose shards are on disk, from the cache if they are unchanged."""
    digest = hashlib.blake2b(f"{_VERSION} {classes} {labeled}".encode(), digest_size=16)
    for name, url in urls.items():
        facts = Path(url).stat()
        digest.update(f"{name}\0{url}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    path = cache / f"{digest.hexdigest()}.json"
    cache.mkdir(parents=True, exist_ok=True)
    # Of several processes on a machine, one counts, and the others wait.
    with FileLock(path.with_suffix(".lock")):
        index = _read(path)
        if "split" not in index:
            shards = [(name, Path(url)) for name, url in urls.items()]
            index = {"split": describe(shards, classes=classes, labeled=labeled)}
            write_index(index, path)
    split: dict[str, Any] = index["split"]
    return split


def _shard(entry: Mapping[str, Any], url: str) -> Shard:
    """Return the shard of an entry in the index."""
    labels, marks = (tuple(map(int, entry.get(key, ()))) for key in ("labels", "marks"))
    keys = tuple(map(str, entry.get("keys", ())))
    return Shard(entry["name"], url, int(entry["images"]), labels, keys, marks, str(entry.get("digest", "")))


def _read(path: Path) -> dict[str, Any]:
    """Read an index; an empty one if it is missing, damaged or of another version, as the shards are then counted."""
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict) or index.get("version") != _VERSION:
        _log.warning("%s: this index is damaged or of another version; counting the shards again", path)
        return {}
    return index
