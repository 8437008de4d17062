"""Files that are whole or absent, and finding them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Write under a temporary name beside `path`, then rename; on any error `path` stays as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def below(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """All files below `root` whose names end in one of `suffixes` and do not start with a dot, sorted; linked
    folders are entered, once each.
    """
    entered, found = set(), []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        found += [Path(folder, name) for name in names if name.endswith(suffixes) and name[0] != "."]
    return sorted(found)
