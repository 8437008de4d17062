"""What flags accept besides numbers and fixed choices, for argparse's `type` and `action`."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.subject import vendor_name


def on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expected on or off, got {text}")
    return text == "on"


def absolute_path(text: str) -> Path:
    """So that a run resumed from another folder finds it."""
    return Path(text).expanduser().absolute()


def save_interval(text: str) -> str:
    """Epochs (`5`) or minutes (`2min`)."""
    if not re.fullmatch(r"0*[1-9]\d*|\d*\.?\d+min", text):
        raise argparse.ArgumentTypeError(f"expected epochs such as 5, or minutes such as 2min, got {text}")
    return text


class VendorNames(argparse.Action):
    """`A`, `Siemens`, `A+B` or `Siemens,Philips` -> their names, sorted, each once."""

    def __call__(self, parser, namespace, values: Sequence[str], option_string: str | None = None) -> None:
        names = {vendor_name(name) for name in re.split("[+,]", "+".join(values)) if name.strip()}
        setattr(namespace, self.dest, sorted(names))
