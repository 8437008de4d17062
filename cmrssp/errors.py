"""What a user can mend."""


class UserError(ValueError):
    """One line for the user: what, where, expected, got, how to mend. The scripts print it and exit with 2.
    """
