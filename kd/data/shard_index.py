"""How many images each archive holds: told by an index beside the archives, or counted once."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from kd.data.samples import MARK_EVERY, Shard, members
from kd.errors import UserError

INDEX_FILE = "index.json"
_VERSION = 1
_AT_ONCE = 4

Counted = tuple[tuple[Shard, ...], tuple[int, ...] | None]
"""Archives, and the images of each class in all of them, where that is known."""


def counted(root: Path, urls: Mapping[str, str], *, classes: int, cache: Path, labeled: bool) -> Counted:
    """Say how many images some archives hold.

    Args:
        root: Folder that holds the index.
        urls: Where each archive lies, by its name.
        classes: Number of classes.
        cache: Folder where the counts of archives that no index tells of are kept.
        labeled: Whether the labels and keys of their images are asked for.

    Raises:
        UserError: If an archive is not as it should be, or lies elsewhere and no index tells of it.
    """
    index = _read(root / INDEX_FILE) or {"version": _VERSION}
    if index.get("version") != _VERSION:
        raise UserError(f"{root / INDEX_FILE}: this index is of another version; delete it, and make it again")
    try:
        for split in (index[name] for name in ("train", "val") if name in index):
            known = {one["name"]: one for one in split["shards"]}
            if urls.keys() <= known.keys() and (not labeled or all("labels" in known[name] for name in urls)):
                return _told(root, urls, known, split["counts"], classes=classes)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{root / INDEX_FILE}: this is no index as kd shard writes it ({error!r}); delete it") from None
    elsewhere = [url for url in urls.values() if not Path(url).is_file()]
    if elsewhere:
        raise UserError(
            f"{elsewhere[0]}: {root / INDEX_FILE} does not say how many images this shard holds; kd shard writes it "
            "beside the shards that it makes"
        )
    return _counted_here(urls, classes=classes, cache=cache, labeled=labeled)


def describe(shards: Sequence[tuple[str, Path]], *, classes: int, labeled: bool) -> dict[str, Any]:
    """Look through archives on the disk and return what an index says of a split.

    Args:
        shards: Name and place of each.
        classes: Number of classes.
        labeled: Whether it has labels and keys.

    Raises:
        UserError: If one is not as it should be.
    """
    counts = [0] * classes
    described: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        looks = threads.map(partial(members, classes=classes), [path for _, path in shards])
        for (name, path), found in zip(shards, looks, strict=True):
            if not found:
                raise UserError(f"{path}: this shard holds no sample (KEY.jpg and KEY.cls)")
            for one in found:
                counts[one.label] += 1
            marks = [one.begin for one in found[::MARK_EVERY]]
            more = {"labels": [one.label for one in found], "keys": [one.key for one in found]} if labeled else {}
            described.append({"name": name, "images": len(found), "bytes": path.stat().st_size, "marks": marks} | more)
    return {"counts": counts, "shards": described}


def write_index(splits: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Write an index of training and validation images: the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({"version": _VERSION} | dict(splits)), encoding="utf-8")
    beside.replace(path)


def _told(
    root: Path, urls: Mapping[str, str], known: Mapping[str, Any], counts: Sequence[int], *, classes: int
) -> Counted:
    if len(counts) != classes:
        raise UserError(
            f"{root / INDEX_FILE}: this index is about {len(counts)} classes, and classes.txt names {classes}"
        )
    for name, url in urls.items():
        path = Path(url)
        if path.is_file() and path.stat().st_size != known[name]["bytes"]:
            raise UserError(
                f"{path}: this shard has {path.stat().st_size:,} bytes, and {root / INDEX_FILE} says "
                f"{known[name]['bytes']:,}; without that file the shards are counted again"
            )
    # Of a part of the shards the images of each class are not known.
    whole = urls.keys() == known.keys()
    return tuple(_shard(known[name], url) for name, url in urls.items()), tuple(counts) if whole else None


def _counted_here(urls: Mapping[str, str], *, classes: int, cache: Path, labeled: bool) -> Counted:
    digest = hashlib.blake2b(f"{_VERSION} {classes} {labeled}".encode(), digest_size=16)
    for name, url in urls.items():
        facts = Path(url).stat()
        digest.update(f"{name}\0{url}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    kept = cache / f"{digest.hexdigest()}.json"
    cache.mkdir(parents=True, exist_ok=True)
    # One process counts, the others of this machine wait for it.
    with FileLock(kept.with_suffix(".lock")):
        index = _read(kept)
        if index is None:
            places = [(name, Path(url)) for name, url in urls.items()]
            index = {"split": describe(places, classes=classes, labeled=labeled)}
            write_index(index, kept)
    split = index["split"]
    return tuple(_shard(one, urls[one["name"]]) for one in split["shards"]), tuple(split["counts"])


def _shard(facts: Mapping[str, Any], url: str) -> Shard:
    labels, keys = facts.get("labels", ()), facts.get("keys", ())
    return Shard(
        name=facts["name"],
        url=url,
        images=int(facts["images"]),
        labels=tuple(map(int, labels)),
        keys=tuple(map(str, keys)),
        marks=tuple(map(int, facts.get("marks", ()))),
    )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this index can't be read: {error}; delete it, and the shards are counted") from None
    return found
