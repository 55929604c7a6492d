"""The entries of the cache folder: listed, verified, and removed, the least recently used first, above a limit."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kd.data import cache_dir, read_manifest, verify_cache
from kd.teachers import verify_store

_DISK_SHARE = 0.25
_STARTED = time.time()


@dataclass(frozen=True)
class CacheEntry:
    """A folder or a file that is kept or removed as a whole.

    Args:
        path: The folder or file.
        kind: ``decoded`` (images), ``logits`` (of teachers), ``examined`` (files) or ``shards`` (their indexes).
        size: Size in bytes.
        last_used: Time of its last use, in seconds since the epoch.
    """

    path: Path
    kind: str
    size: int
    last_used: float

    def verify(self) -> tuple[int, int]:
        """Compare the content with its checksums; return the numbers of parts and of damaged ones.

        An entry that can't be read is a single, damaged part.
        """
        with suppress(OSError, ValueError, KeyError):
            return _VERIFY[self.kind](self.path)
        return 1, 1

    def remove(self) -> None:
        """Remove it; a process that is using it computes what is missing again."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


def cache_entries() -> list[CacheEntry]:
    """Return the entries of the cache folder, most recently used first."""
    entries = []
    for kind in _VERIFY:
        for path in (cache_dir() / kind).glob("*"):
            # Another process may remove an entry at any time.
            with suppress(FileNotFoundError):
                facts = [file.stat() for file in (path.iterdir() if path.is_dir() else [path])]
                if facts and path.suffix != ".lock":
                    size, last_used = sum(each.st_size for each in facts), max(each.st_mtime for each in facts)
                    entries.append(CacheEntry(path, kind, size, last_used))
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def make_room(size: int, limit: float | None = None) -> bool:
    """Remove the least recently used entries until ``size`` more bytes fit into the limit; return whether they do.

    Entries that were used since the program started are kept.

    Args:
        size: Number of bytes.
        limit: Maximum size of all entries, in bytes; ``None``: a quarter of the disk.
    """
    entries = cache_entries()
    existing = next(path for path in (cache_dir(), *cache_dir().absolute().parents) if path.exists())
    limit = _DISK_SHARE * shutil.disk_usage(existing).total if limit is None else limit
    total = size + sum(entry.size for entry in entries)
    for entry in reversed(entries):
        if total <= limit or size > limit or entry.last_used >= _STARTED:
            break
        entry.remove()
        total -= entry.size
    return total <= limit


def _verify_manifest(path: Path) -> tuple[int, int]:
    return 1, int(read_manifest(path) is None)


def _verify_json(path: Path) -> tuple[int, int]:
    json.loads(path.read_text(encoding="utf-8"))
    return 1, 0


_VERIFY: dict[str, Callable[[Path], tuple[int, int]]] = {
    "decoded": verify_cache,
    "logits": verify_store,
    "examined": _verify_manifest,
    "shards": _verify_json,
}
