"""Exceptions that end a command early without being a bug; every package may raise them."""

import errno

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_PERMISSIONS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_PATHS = frozenset({errno.ESTALE, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG})


def describe_environment_error(error: OSError) -> str | None:
    """Return a message for an error due to the user's disks, permissions or paths; ``None`` if it may be a bug."""
    if error.errno in _DISK_FULL:
        return f"the disk is full ({error.filename or error.strerror})"
    if error.errno not in _PERMISSIONS | _PATHS:
        return None
    return f"{'' if error.filename is None else f'{error.filename}: '}{error.strerror}"


class UserError(Exception):
    """A mistake of the user: the message describes the problem, its source, and how to fix it.

    Commands print the message on standard error and exit with status 2; any other exception is a bug and shows its
    traceback.
    """


class LostContact(UserError):  # noqa: N818 (named after the event)
    """Another process of the same run has ended or can't be reached; every remaining process prints the message."""


class NotFiniteError(UserError):
    """The loss or the gradient became infinite or NaN; a hyperparameter search counts it as the result of a trial."""


class DamagedFile(UserError):  # noqa: N818 (names what the error is about)
    """A file is truncated, or its content doesn't match its checksum."""


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A signal ended the program; commands then exit with 128 plus the number ``received``, as shells do."""

    def __init__(
        self, message: str, *, received: int, advice: str = "Resume with the same command and --resume."
    ) -> None:
        super().__init__(message)
        self.received = received
        self.advice = advice
