"""The two errors that a user is meant to read."""


class InputError(ValueError):
    """What the user gave cannot be used. The message says what was wrong, what was expected and what to type.

    The command line prints it as one paragraph and leaves with status 1.
    """


class UsageError(InputError):
    """The command line itself is wrong (an unknown option, a value of the wrong type): status 2."""
