"""The CSV tables that lie beside cines: rows by column name, whatever their order, quoting or separator."""

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmrssp.data.subject import LEFT_OUT, USED, Problem
from cmrssp.errors import UserError


def read(path: Path, key: str, *, lower: bool = False) -> list[dict[str, str]] | None:
    """The rows of a CSV with a column `key`, cells stripped, without rows that have no key; None for a table
    without such a column. `lower` ignores the case of column names. Raises UserError for a file that is no
    CSV.
    """
    try:
        lines = io.StringIO(read_text(path), newline="").readlines()
        while lines and (not lines[0].strip() or lines[0].startswith("sep=")):
            del lines[0]
        separator = max(
            ",;\t", key=(lines or [""])[0].count
        )  # spreadsheets of some countries write semicolons
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
    """The text of a file in UTF-8 or UTF-16, as its first bytes say, else in Windows' cp1252; its letters are
    composed, so that names can be compared.
    """
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


def first_with(files: Sequence[Path], key: str) -> list[dict[str, str]] | None:
    """The rows of the CSV that has a column `key`, the nearest to the top; None without one."""
    for path in sorted((f for f in files if f.suffix == ".csv"), key=lambda f: (len(f.parts), f)):
        rows = read(path, key)
        if rows is not None:
            return rows
    return None


def against_cines(rows: Iterable[str] | None, cines: Iterable[str], dataset: str, key: str) -> list[Problem]:
    """What is odd about the ids in the table of a data set (None: no table with a column `key`), beside those
    of its cines.
    """
    if rows is None:
        what = f"{dataset}: no CSV has a column '{key}', so vendors and pathologies are unknown"
        return [Problem("", "", what, USED)]
    missing = without_cine(rows, cines)
    return [Problem("", "", f"{dataset}: {missing}", LEFT_OUT)] if missing else []


def without_cine(rows: Iterable[str], cines: Iterable[str]) -> str:
    """One line on the rows of a table that have no cine; "" where all have one."""
    missing = sorted(set(rows) - set(cines))
    more = f", ... ({len(missing)} in all)" if len(missing) > 8 else ""
    names = ", ".join(missing[:8]) + more
    return f"the table names subjects that have no cine here: {names}" if missing else ""
