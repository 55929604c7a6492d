"""Files that are either complete or absent: written under a temporary name, flushed to disk, then renamed."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

DIGEST_SIZE = 16
"""Bytes of the hash that identifies an image file's content."""

_MODEL_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors*", "pytorch_model*.bin*")
"""The files of a model in a folder as on the Hugging Face hub; weights may be in several, beside an index."""


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends without an exception.

    The file has a unique name in the folder of ``path``, which is created if it is missing. It is flushed to disk
    before it is renamed, so that after a crash or a power loss ``path`` is the old file or the new one.
    """
    for created in reversed([folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]):
        created.mkdir(exist_ok=True)
        _sync_folder(created.parent)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def keep_previous(path: Path, previous: Path) -> None:
    """Keep the present content of ``path`` as ``previous``, before ``path`` is replaced."""
    if not path.is_file():
        return
    temporary = _temporary(previous)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            # Not all file systems have hard links.
            shutil.copyfile(path, temporary)
        temporary.replace(previous)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove temporary files that killed processes left in a folder, at any depth.

    Args:
        folder: The folder.
        older_than: Only files that were last written this many seconds ago; another process may be writing others.
    """
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def reserve(file: BinaryIO, size: int) -> None:
    """Reserve ``size`` bytes on the disk for a file, so that writing to a mapping of it can't fail for lack of space.

    Raises:
        OSError: If the disk has too little space.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        # macOS: the file is filled, which fails like any other write.
        file.write(bytes(size - file.seek(0, 2)))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with write_atomically(path) as file:
        file.write(text.encode())


def write_json(path: Path, values: Any) -> None:  # noqa: ANN401 (whatever JSON can hold)
    """Write an indented JSON file atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder as on the Hugging Face hub, that of its configuration and weights.

    The latter is the hash of a line for each file, ``HASH  NAME``, as ``sha256sum`` prints them, sorted by name.
    """
    if path.is_dir():
        files = sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()})
        lines = "".join(f"{sha256_of(file)}  {file.name}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(content: bytes | memoryview) -> bytes:
    """Return a hash of ``DIGEST_SIZE`` bytes of an image file's content."""
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest()
