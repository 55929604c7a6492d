"""Files that are either complete or absent: written beside their place, flushed to disk, then renamed."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of ``path`` when the block ends without an exception.

    The file is created in the folder of ``path``, which is made if need be, under a unique name; it is flushed to disk
    before it is renamed, so that after a crash or a power loss ``path`` is the old file or the new one. After an
    exception the temporary file is removed and ``path`` is as it was.

    Args:
        path: The file to write or replace.

    Yields:
        The temporary file, opened for writing bytes.

    Raises:
        OSError: If the file can't be written, such as on a full disk.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with write_atomically(Path(folder) / "new" / "greeting.txt") as file:
        ...         _ = file.write(b"hello")
        ...     (Path(folder) / "new" / "greeting.txt").read_text()
        'hello'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # mkstemp makes a file for its owner alone.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            yield cast("BinaryIO", file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see :func:`write_atomically`."""
    with write_atomically(path) as file:
        file.write(text.encode())


def write_json(path: Path, values: Any) -> None:  # noqa: ANN401 (whatever JSON can hold)
    """Write a JSON file atomically, indented; see :func:`write_atomically`."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
