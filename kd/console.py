"""The console that every command writes to."""

from typing import IO

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console


def make_console(*, stderr: bool = False, file: IO[str] | None = None) -> Console:
    """Return a console for plain messages: no markup, no highlighting, silent in all processes but the first.

    On a terminal, lines wrap between words. Elsewhere they are not wrapped, so that a message stays one line in a file.

    Args:
        stderr: Whether it writes to standard error.
        file: Where to write instead of the standard streams.
    """
    is_first = getattr(rank_zero_only, "rank", 0) in (0, None)
    console = Console(stderr=stderr, file=file, highlight=False, markup=False, quiet=not is_first)
    console.soft_wrap = not console.is_terminal
    return console
