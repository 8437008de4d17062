"""The CSV tables that lie beside cines: rows by column name, whatever their order, quoting or separator."""

import csv
import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmrssp.data.subject import LEFT_OUT, USED, Problem, frame_number, listed, vendor_name
from cmrssp.errors import UserError

Rows = dict[str, dict[str, str]]  # {subject: its row}


def read(path: Path, key: str) -> list[dict[str, str]] | None:
    """The rows that have a `key`, cells stripped, column names in small letters; None without the column.
    Raises UserError for a file that is no CSV.
    """
    lines = io.StringIO(read_text(path), newline="").readlines()
    while lines and (not lines[0].strip() or lines[0].startswith("sep=")):
        del lines[0]
    separator = max(",;\t", key=(lines or [""])[0].count)  # some countries' spreadsheets write ;
    reader = csv.DictReader(lines, delimiter=separator, restkey="")
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        if key not in reader.fieldnames:
            return None
        rows = [{name: (cell or "").strip() for name, cell in row.items() if name} for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None
    return [row for row in rows if row[key]]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, UTF-16 or else Windows' cp1252, its letters `composed`."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return composed(content.decode("utf-16", errors="replace"))
    try:
        return composed(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return composed(content.decode("cp1252", errors="replace"))


def composed(name: str) -> str:
    """One spelling of accented letters: a Mac decomposes them in file names."""
    return unicodedata.normalize("NFC", name)


def topmost(
    files: Sequence[Path], key: str, cines: Mapping[str, Path], dataset: str, digits: int = 0
) -> tuple[Rows, list[Problem]]:
    """The topmost CSV with a column `key` (zeros up to `digits`), and how it differs from `cines`."""
    for path in sorted((f for f in files if f.suffix.lower() == ".csv"), key=lambda f: (len(f.parts), f)):
        if (rows := read(path, key.lower())) is not None:
            by_subject = {row[key.lower()].zfill(digits): row for row in rows}
            named = {id: (f"{dataset}/{id}", file) for id, file in cines.items()}
            return by_subject, differences(path, by_subject, named)
    what = f"{dataset}: no CSV has a column '{key}', so vendors and pathologies are unknown"
    return {}, [Problem("", "", what, USED)]


def differences(path: Path, rows: Rows, cines: Mapping[str, tuple[str, Path]]) -> list[Problem]:
    """Cines ({id: (subject key, file)}) without a row, and rows without a cine."""
    what = f"no row in {path.name}"
    odd = [Problem(key, file.name, what, USED) for id, (key, file) in cines.items() if id not in rows]
    if lost := sorted(rows.keys() - cines.keys()):
        what = f"the table names subjects that have no cine here: {listed(lost)}"
        odd.append(Problem("", path.name, what, LEFT_OUT))
    return odd


def about(row: Mapping[str, str], first_frame: int = 0) -> dict[str, Any]:
    """What a row says of a subject, as fields of Subject; frames count from `first_frame`."""
    return {
        "vendor": vendor_name(row.get("vendorname") or row.get("vendor", "")),
        "pathology": row.get("pathology") or row.get("disease") or row.get("group", ""),
        "ed": frame_number(row.get("ed", ""), first_frame),
        "es": frame_number(row.get("es", ""), first_frame),
    }
