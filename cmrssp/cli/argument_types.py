"""What flags accept beyond plain numbers and words."""

import argparse
from collections.abc import Callable
from pathlib import Path

from cmrssp.data.subject import vendor_name

_MANY = 2**63  # upper limit of every number; it also excludes infinity


def share(text: str) -> float:
    return _ranged(float, lambda value: 0 <= value <= 1, "from 0 to 1")(text)


def folder(text: str) -> Path:
    """Absolute, so that it means the same to a run that goes on from another folder."""
    return Path(text).expanduser().absolute()


def at_least_0(kind: type) -> Callable[[str], float]:
    return _ranged(kind, lambda value: value >= 0, "of at least 0")


def positive(kind: type) -> Callable[[str], float]:
    return _ranged(kind, lambda value: value > 0, "above 0")


def save_interval(text: str) -> str:
    number = text.removesuffix("min")
    try:
        if float(number) > 0 and (text.endswith("min") or float(number).is_integer()):
            return text if text.endswith("min") else str(int(float(number)))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected epochs such as 5, or minutes such as 2min, got {text}")


def vendor_names(text: str) -> list[str]:
    """One or several vendors, as `A`, `Siemens`, `A+B` or `Siemens,Philips`."""
    return [vendor_name(name) for name in text.replace("+", ",").split(",") if name.strip()]


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected some characters, got none")
    return text


def _ranged(kind: type, fits: Callable[[float], bool], what: str) -> Callable[[str], float]:
    def parse(text: str):
        value = kind(text)
        if not (fits(value) and value < _MANY):
            raise argparse.ArgumentTypeError(f"expected a number {what}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse
