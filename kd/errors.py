"""Exceptions that end a command early without being a bug; every package may raise them."""


class UserError(Exception):
    """A mistake of the user: what is wrong, where it comes from and how to fix it.

    Commands print the message on standard error and exit with status 2; any other exception is a bug and shows its
    traceback.
    """


class LostContact(UserError):  # noqa: N818 (named after the event)
    """Another process of the same run has ended or can't be reached; every remaining process prints the message."""


class NotFiniteError(UserError):
    """The loss or the gradient of a training became infinite or NaN.

    A hyperparameter search treats it as the result of a trial; elsewhere it is a mistake of the user.
    """


class Interrupted(Exception):  # noqa: N818 (not an error)
    """The program was told to stop; the progress is saved.

    Args:
        message: What stopped it, and where the progress is saved.
        received: The signal's number; commands exit with 128 plus this number, as shells do.
        advice: How to resume.
    """

    def __init__(
        self, message: str, *, received: int, advice: str = "Resume with the same command and --resume."
    ) -> None:
        super().__init__(message)
        self.received = received
        self.advice = advice
