"""The console that every command writes to."""

import os
import sys
from typing import IO

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

# Where launchers store the rank of a process, as Lightning reads it.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


class _Console(Console):
    """A console whose output may be closed, as by ``head``: what follows isn't printed, and the program goes on."""

    def on_broken_pipe(self) -> None:
        """Discard all further output."""
        self.quiet = True
        if self.file is sys.stdout:
            # The interpreter would fail when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_console(*, stderr: bool = False, file: IO[str] | None = None) -> Console:
    """Return a console that prints text as it is, and that is silent in all processes but the first.

    On a terminal, lines wrap between words. Elsewhere they are not wrapped, so that a message stays one line in a file.
    """
    # Lightning sets the attribute when it is imported.
    rank = getattr(rank_zero_only, "rank", None)
    if rank is None:
        rank = next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)
    # Without emoji=False, the "net.py:Loop:" of a message would become the picture of a loop.
    console = _Console(stderr=stderr, file=file, highlight=False, markup=False, emoji=False, quiet=rank != 0)
    console.soft_wrap = not console.is_terminal
    return console
