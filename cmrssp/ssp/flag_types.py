"""Numbers in a range, and paths, as argparse's `type`."""

import argparse
from collections.abc import Callable

_LARGEST = 2**63  # the limit also excludes infinity


def path(text: str) -> str:
    """Not that of a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return text


def fraction(text: str) -> float:
    return _ranged(float, lambda value: 0 <= value <= 1, "from 0 to 1")(text)


def at_least_0(kind: type) -> Callable[[str], float]:
    return _ranged(kind, lambda value: 0 <= value < _LARGEST, "of at least 0")


def positive(kind: type) -> Callable[[str], float]:
    return _ranged(kind, lambda value: 0 < value < _LARGEST, "above 0")


def _ranged(kind: type, fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not fits(kind(text)):
            raise argparse.ArgumentTypeError(f"expected a number {expected}, got {text}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names it when the text is no number
    return parse
