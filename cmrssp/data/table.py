"""The CSV tables that lie beside cines: rows by column name, whatever their order, quoting or separator."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmrssp.errors import UserError


def read(path: Path, key: str, *, lower: bool = False) -> list[dict[str, str]] | None:
    """The rows of a CSV with a column `key`, cells stripped, empty rows and rows without a key left out; None
    for a table without such a column. Raises UserError for a file that is no CSV.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            head = file.readline()
            file.seek(0)
            separator = max(",;\t", key=head.count)  # spreadsheets of some countries write semicolons
            reader = csv.DictReader(file, delimiter=separator)
            columns = [(name or "").strip() for name in reader.fieldnames or ()]
            columns = [name.lower() for name in columns] if lower else columns
            if key not in columns:
                return None
            reader.fieldnames = columns
            rows = [{k: (v or "").strip() for k, v in row.items() if k is not None} for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None
    return [row for row in rows if row[key]]


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
