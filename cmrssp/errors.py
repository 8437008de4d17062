"""What a user can mend."""


class UserError(ValueError):
    """An error that a user can fix, in one line: what, where, expected, got, how to fix. Exit status 2."""
