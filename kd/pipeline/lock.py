"""The lock of an experiment's folder: one experiment is written by one group of processes at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kd.errors import UserError
from kd.files import remove_temporary, write_text

_LOCK, _HOLDER = ".lock", ".lock-holder"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock an experiment's folder inside the block; the lock ends with its process, however that ends.

    Temporary files that a killed process left are removed.

    Raises:
        UserError: If another process holds the lock, or the folder can't be written to.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / _LOCK)
            lock.acquire(timeout=0)
            stack.callback(lock.release)
            stack.callback(_remove, folder / _HOLDER)
            write_text(folder / _HOLDER, f"process {os.getpid()} on {socket.gethostname()}\n")
            remove_temporary(folder)
        except Timeout:
            holder = "unknown"
            with suppress(OSError):
                holder = (folder / _HOLDER).read_text(encoding="utf-8").strip()
            raise UserError(
                f"--name {folder.name}: another process is writing to {folder} ({holder}); wait until it ends, or "
                "choose another --name"
            ) from None
        except OSError as error:
            problem = f"can't write there: {error.strerror or error}; choose another folder"
            raise UserError(f"--default_root_dir {folder.parent}: {problem}") from None
        yield


def _remove(path: Path) -> None:
    # If the whole folder is gone by now, the training's own error must be the one that is shown.
    with suppress(OSError):
        path.unlink()
