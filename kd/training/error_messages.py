"""Turning errors of the machine and of Lightning into messages that say what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from kd.errors import LostContact, UserError

_RESUME = "the last checkpoint is intact: resume with --resume"

# How gloo, NCCL and torch's key-value store report a process that doesn't answer.
_NO_ANSWER = re.compile(
    r"gloo|NCCL|Connection (?:reset|closed|refused)|Broken pipe|Socket Timeout|store.*timeout", re.IGNORECASE
)


@contextmanager
def readable_errors(*, batch_size: int | None = None) -> Iterator[None]:
    """Raise a readable error where memory or disk runs out, a process is gone, or Lightning refuses a configuration.

    Args:
        batch_size: Images in a batch, for the message.

    Raises:
        UserError: For a configuration that Lightning refuses, and when memory or disk runs out.
        LostContact: When another process of the run is gone.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"Lightning refuses this configuration: {error}") from None
    except torch.OutOfMemoryError as error:
        raise UserError(_out_of_memory(batch_size, error)) from error
    except MemoryError as error:
        raise UserError(f"out of memory: try a smaller --batch_size; {_RESUME}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk is full ({error.filename or error.strerror}); {_RESUME}") from error
    except RuntimeError as error:
        text = str(error)
        if re.search(r"DataLoader worker .* (?:killed|exited)", text):
            raise UserError(
                "a data loading process was killed, probably out of memory: try fewer --num_workers or a smaller "
                f"--batch_size; {_RESUME}"
            ) from error
        if re.search(r"can't allocate memory|out of memory", text):
            raise UserError(_out_of_memory(batch_size, error)) from error
        if torch.distributed.is_available() and torch.distributed.is_initialized() and _NO_ANSWER.search(text):
            reason = text.rpartition("] ")[2].partition(". This")[0]
            raise LostContact(f"lost contact with another process of this run ({reason}); {_RESUME}") from error
        raise


def _out_of_memory(batch_size: int | None, error: Exception) -> str:
    reason = str(error).splitlines()[0].partition(". GPU")[0]
    if batch_size is None:
        return f"out of memory ({reason}); --batch_size auto finds the largest that fits"
    return (
        f"--batch_size {batch_size}: out of memory ({reason}); --batch_size {max(1, batch_size // 2)} --accumulate 2 "
        "needs half of it, and --batch_size auto finds the largest that fits"
    )
