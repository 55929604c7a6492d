"""What ends a training from outside, in plain words: no memory, no disk, no other process."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from kd.errors import LostContact, UserError

_GO_ON = "the last checkpoint is whole, and the same command with --resume goes on from there"

# How gloo, NCCL and torch's store of keys say that nobody answers.
_NOBODY_ANSWERS = re.compile(
    r"gloo|NCCL|Connection (?:reset|closed|refused)|Broken pipe|Socket Timeout|store.*timeout", re.IGNORECASE
)


@contextmanager
def in_plain_words(*, batch_size: int | None = None) -> Iterator[None]:
    """Turn what Lightning refuses, and what the machine does not give, into an error that a person can act on.

    Args:
        batch_size: Images in a batch, for the message.

    Raises:
        UserError: If a configuration makes no sense, or memory or disk ran out.
        LostContact: If another process of the same run is gone.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"Lightning can't run so: {error}") from None
    except torch.OutOfMemoryError as error:
        raise UserError(_out_of_memory(batch_size, error)) from error
    except MemoryError as error:
        raise UserError(f"there is not memory enough: a smaller --batch_size needs less; {_GO_ON}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk is full ({error.filename or error.strerror}); {_GO_ON}") from error
    except RuntimeError as error:
        text = str(error)
        if re.search(r"DataLoader worker .* (?:killed|exited)", text):
            raise UserError(
                "a process that loads images was killed, as happens where memory runs out: fewer --num_workers or a "
                f"smaller --batch_size need less; {_GO_ON}"
            ) from error
        if re.search(r"can't allocate memory|out of memory", text):
            raise UserError(_out_of_memory(batch_size, error)) from error
        if torch.distributed.is_available() and torch.distributed.is_initialized() and _NOBODY_ANSWERS.search(text):
            reason = text.rpartition("] ")[2].partition(". This")[0]
            raise LostContact(f"another process of this run ended, or can't be reached ({reason}); {_GO_ON}") from error
        raise


def _out_of_memory(batch_size: int | None, error: Exception) -> str:
    first = str(error).splitlines()[0].partition(". GPU")[0]
    asked = "" if batch_size is None else f"--batch_size {batch_size}: "
    half = "" if batch_size is None else f"; --batch_size {max(1, batch_size // 2)} --accumulate 2 needs half of it"
    return f"{asked}there is not memory enough ({first}){half}, and --batch_size auto finds what fits"
