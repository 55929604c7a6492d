"""What ends a command early without being a bug; every room may raise it."""


class UserError(Exception):
    """What is wrong, where it came from and what to do, in words for the person at the keyboard.

    The commands print it on standard error and end with status 2; any other exception is a bug and shows its traceback.
    """


class LostContact(UserError):  # noqa: N818 (it says what happened)
    """Another process of the same run is gone; each of those that are left says it."""


class NotFiniteError(UserError):
    """A training left the numbers: its loss or its gradient is infinite or none.

    A search over learning rates takes it for an answer; to all others it is a person's mistake.
    """


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """The program was asked to stop; what was done is saved.

    Args:
        message: What asked, and where what was done is saved.
        received: The signal's number: the commands end with 128 more, as a shell has it.
        advice: How to go on.
    """

    def __init__(
        self, message: str, *, received: int, advice: str = "The same command with --resume goes on from there."
    ) -> None:
        super().__init__(message)
        self.received = received
        self.advice = advice
