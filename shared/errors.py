"""The errors that a user meets: a line that says what is wrong and how to put it right, and the exit code of a command."""


class UserError(Exception):
    """Something the user can put right; the message is one line and says how."""

    exit_code = 2


class Busy(UserError):
    """Another process holds the lock: the same command is right once it has ended."""

    exit_code = 3
