"""The CSV tables that lie beside cines: rows by column name, whatever their order, quoting or separator."""

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmrssp.data.subject import LEFT_OUT, USED, Problem
from cmrssp.errors import UserError


def read(path: Path, key: str, *, lower: bool = False) -> list[dict[str, str]] | None:
    """The rows of a CSV that have a `key`, cells stripped; None without such a column. `lower` makes column
    names small. Raises UserError for a file that is no CSV.
    """
    try:
        lines = io.StringIO(read_text(path), newline="").readlines()
        while lines and (not lines[0].strip() or lines[0].startswith("sep=")):
            del lines[0]
        separator = max(",;\t", key=(lines or [""])[0].count)  # some countries' spreadsheets write ;
        reader = csv.DictReader(lines, delimiter=separator)
        columns = [(name or "").strip() for name in reader.fieldnames or ()]
        columns = [name.lower() for name in columns] if lower else columns
        if key not in columns:
            return None
        reader.fieldnames = columns
        rows = [{k: (v or "").strip() for k, v in row.items() if k is not None} for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None
    return [row for row in rows if row[key]]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, UTF-16 or else Windows' cp1252, its letters `composed`."""
    content = path.read_bytes()
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("utf-16" if utf16 else "cp1252", errors="replace")
    return composed(text)


def composed(name: str) -> str:
    """One spelling of accented letters: a Mac decomposes them in file names."""
    return unicodedata.normalize("NFC", name)


def first_with(files: Sequence[Path], key: str, digits: int = 0) -> dict[str, dict[str, str]] | None:
    """{key, filled with zeros to `digits`: row} of the topmost CSV with a column `key`; None without one."""
    for path in sorted((f for f in files if f.suffix == ".csv"), key=lambda f: (len(f.parts), f)):
        if (rows := read(path, key)) is not None:
            return {row[key].zfill(digits): row for row in rows}
    return None


def against_cines(rows: Iterable[str] | None, cines: Iterable[str], dataset: str, key: str) -> list[Problem]:
    """How the ids in a data set's table (None: none has a column `key`) differ from those of its cines."""
    if rows is None:
        what = f"{dataset}: no CSV has a column '{key}', so vendors and pathologies are unknown"
        return [Problem("", "", what, USED)]
    missing = without_cine(rows, cines)
    return [Problem("", "", f"{dataset}: {missing}", LEFT_OUT)] if missing else []


def without_cine(rows: Iterable[str], cines: Iterable[str]) -> str:
    """One line on the rows of a table that have no cine; "" if all have one."""
    missing = sorted(set(rows) - set(cines))
    return f"the table names subjects that have no cine here: {first(missing)}" if missing else ""


def first(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
