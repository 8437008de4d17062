"""Errors that a user can fix."""


class UserError(ValueError):
    """An error that a user can fix, in one line: what, where, expected, got, how to fix. Exit status 2."""


def one_line(error: Exception) -> str:
    """What an error says, in one line; with its type where it was not written for users."""
    text = " ".join(str(error).split())[:300]
    return text if text and isinstance(error, UserError | OSError) else f"{type(error).__name__}: {text}"
