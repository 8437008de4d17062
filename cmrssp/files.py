"""Files that are whole or absent, JSON and CSV among them, and finding files."""

import csv
import io
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from cmrssp.errors import UserError


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Write under a temporary name beside `path`, then rename; on any error `path` stays as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, older_than_s: float = 0.0) -> None:
    """Remove what processes that were killed have left of `atomic` in a folder."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another user's, or a read-only disk
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


def below(
    root: Path, suffixes: tuple[str, ...], skip: Path | None = None, *, any_name: bool = False
) -> list[Path]:
    """All files below `root` whose names end in one of `suffixes`, in small or capital letters, sorted; none
    whose name starts with a dot, or in the folder `skip`. Enters linked folders, each once. Raises UserError
    for a folder that may not be read and, unless `any_name`, for a name that is not UTF-8.
    """
    entered = {os.path.realpath(skip)} - {os.path.realpath(root)} if skip else set()
    found: list[Path] = []

    def unreadable(error: OSError) -> None:
        if isinstance(error, PermissionError) and Path(error.filename).name != "lost+found":
            raise UserError(f"{error.filename}: cannot be looked into: {error.strerror}")

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        subfolders.sort()
        real = os.path.realpath(folder)
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        found += [Path(folder, name) for name in names if name.lower().endswith(suffixes) and name[0] != "."]
    for path in () if any_name else found:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(f"{str(path)!a}: the name is not UTF-8; rename it") from None
    return sorted(found)


def check_writable(flag: str, folder: Path) -> None:
    """Raise UserError where the folder, or the nearest one above that exists, takes no new file."""
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {present} is no folder that can be written to; give another")


def write_json(path: Path, content: Any) -> None:
    """Raises ValueError for NaN, which JSON does not have; other values that it lacks become text."""
    with atomic(path) as file:
        file.write((json.dumps(content, indent=1, default=str, allow_nan=False) + "\n").encode())


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} without one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Dicts with the same keys; floats with six decimals, what was not measured empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(list(row) for row in rows[:1])
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    with atomic(path) as file:
        file.write(text.getvalue().encode())


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6f}" if isinstance(value, float) else value


def hashed(text: str) -> str:
    """16 hexadecimal digits that tell texts apart and do not show them."""
    return sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
