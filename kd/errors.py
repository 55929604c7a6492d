"""The one kind of error that is a person's to mend; every room may raise it."""


class UserError(Exception):
    """What is wrong, where it came from and what to do, in words for the person at the keyboard.

    The commands print it on standard error and end with status 2; any other exception is a bug and shows its traceback.
    """
