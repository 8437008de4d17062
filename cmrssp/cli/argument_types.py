"""What flags accept besides numbers and fixed choices, as argparse's `type`."""

import argparse
from pathlib import Path

from cmrssp.data.subject import vendor_name


def on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expected on or off, got {text}")
    return text == "on"


def folder(text: str) -> Path:
    """An absolute path, so that a run resumed from another folder finds it."""
    return Path(text).expanduser().absolute()


def save_interval(text: str) -> str:
    """Epochs (`5`) or minutes (`2min`)."""
    number = text.removesuffix("min")
    try:
        if float(number) > 0 and (text.endswith("min") or float(number).is_integer()):
            return text if text.endswith("min") else str(int(float(number)))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected epochs such as 5, or minutes such as 2min, got {text}")


def vendor_names(text: str) -> list[str]:
    """One or more vendors: `A`, `Siemens`, `A+B` or `Siemens,Philips`."""
    return [vendor_name(name) for name in text.replace("+", ",").split(",") if name.strip()]


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected some characters, got none")
    return text
