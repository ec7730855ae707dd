"""The one error that a user meets: a line that says what is wrong and how to put it right."""


class UserError(Exception):
    """Something the user can put right; the message is one line and says how."""
