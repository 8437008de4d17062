"""What a layout knows of a subject, and what can be wrong with it."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmrssp.errors import UserError

CLASSES = ("LV", "MYO", "RV")  # label ids 1, 2, 3 everywhere in this package, as in M&Ms
PLAIN = "folder"  # the data set's name of a plain folder
# What is done about a problem, worst first. NOT_MEASURED: the images are used, volumes would be wrong.
DONE = LEFT_OUT, NOT_MEASURED, CORRECTED, USED = "left out", "not measured", "used with correction", "used"
Finding = tuple[str, str]  # (what is odd, what was done: one of DONE)

_VENDORS = {
    "Siemens": r"siemens.*|a",
    "Philips": r"philips.*|b",
    "GE": r"ge|ge[ _,.-].*|general electric.*|c",
    "Canon": r"(canon|toshiba).*|d",
}


class BrokenSubject(UserError):
    """A subject that cannot be used; the message names the file, what was expected and what was found."""


@dataclass(frozen=True)
class Problem:
    """Something odd, and what was done about it. `subject` is a key, or "" for a whole data set."""

    subject: str
    file: str
    what: str
    done: str  # one of DONE

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.done, self.subject, self.file, self.what)))


@dataclass(frozen=True)
class LabelFile:
    """A label file of all frames (4D), of `frame` (0-based), or of the frame that looks like `image`."""

    path: Path
    frame: int | None = None
    image: Path | None = None
    phase: str = ""  # ED or ES, from the file's name


@dataclass(frozen=True)
class Subject:
    """What a layout knows of a subject without opening an image. Nothing here is read from a label file."""

    dataset: str
    id: str
    cine: Path
    labels: tuple[LabelFile, ...] = ()
    label_ids: tuple[int, ...] = (0, 1, 2, 3)  # our id of each id in the file
    vendor: str = ""
    pathology: str = ""
    ed: int | None = None  # 0-based frames according to the data set's table
    es: int | None = None
    part: str = ""  # train, validation or test where the data set itself says so
    patient: str = ""  # of whom there may be several subjects; "" if there is one alone
    source: Any = None  # if `cine` is a folder: the layouts.dicom_stack.Stack of its voxels
    height_m: float | None = None
    weight_kg: float | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return self.source.files if self.source else (self.cine,)

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.id}"

    @property
    def file_name(self) -> str:
        return self.id.replace("/", "__")


def vendor_name(text: str) -> str:
    """One spelling of a vendor's name or M&Ms letter (A to D); any other name stays as it is."""
    text = text.strip()
    return next((name for name, pattern in _VENDORS.items() if re.fullmatch(pattern, text, re.I)), text)


def frame_number(text: str, first: int = 0) -> int | None:
    """A table's frame number, counted from `first`, as a 0-based one; None for anything else."""
    number = re.fullmatch(r"\s*([0-9]{1,6})(\.0*)?\s*", text)
    return int(number[1]) - first if number and int(number[1]) >= first else None


def listed(items: Collection) -> str:
    """The first eight of some names or numbers, and how many there are if there are more."""
    some = ", ".join(map(str, list(items)[:8]))
    return some if len(items) <= 8 else f"{some}, ... ({len(items)} in all)"
