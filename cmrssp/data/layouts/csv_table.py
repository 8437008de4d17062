"""The CSV tables that lie beside cines: rows by column name, whatever their order, quoting or separator."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmrssp.errors import UserError


def read(path: Path, key: str, *, lower: bool = False) -> list[dict[str, str]] | None:
    """The rows of a CSV with a column `key`, cells stripped, empty rows and rows without a key left out; None
    for a table without such a column. Raises UserError for a file that is no CSV.
    """
    try:
        lines = io.StringIO(_text(path), newline="").readlines()
        while lines and (not lines[0].strip() or lines[0].startswith("sep=")):
            del lines[0]
        head = lines[0] if lines else ""
        separator = max(",;\t", key=head.count)  # spreadsheets of some countries write semicolons
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


def _text(path: Path) -> str:
    """As the first bytes say: UTF-16, else UTF-8."""
    content = path.read_bytes()
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")


def find(files: Sequence[Path], key: str) -> list[dict[str, str]] | None:
    """The rows of that CSV among the files which has a column `key`, the nearest to the top; None without
    one.
    """
    for path in sorted((f for f in files if f.suffix == ".csv"), key=lambda f: (len(f.parts), f)):
        rows = read(path, key)
        if rows is not None:
            return rows
    return None


def unmatched(rows: Iterable[str], found: Iterable[str]) -> str:
    """One line on the rows of a table for which no cine was found; "" where all were."""
    missing = sorted(set(rows) - set(found))
    if not missing:
        return ""
    more = f", ... ({len(missing)} in all)" if len(missing) > 8 else ""
    return f"the table names subjects that have no cine here: {', '.join(missing[:8])}{more}"
