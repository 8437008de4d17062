"""Errors that a user can fix."""


class UserError(ValueError):
    """An error that a user can fix, in one line: what, where, expected, got, how to fix. Exit status 2."""


def one_line(error: Exception) -> str:
    """What an error says, in one line of at most 300 characters; with its type if it is not for users."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + f": {str(error.filename)[-60:]}" * bool(error.filename)
    return text if text and isinstance(error, UserError) else f"{type(error).__name__}: {text}"
