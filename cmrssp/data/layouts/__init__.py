"""One module for each layout of files; here is how those with fixed file names find their subjects."""

import re
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts.csv_table import composed
from cmrssp.data.subject import LEFT_OUT, Problem


def by_subject(
    files: Sequence[Path], names: re.Pattern, dataset: str, cine: str
) -> tuple[list[tuple[str, dict[str, Path]]], list[Problem]]:
    """[(subject, its parts)] of the files whose names match (group 1: subject, group 2: part), and what is
    left out: subjects without the part `cine`, and the first of two files with one name (.nii, .nii.gz).
    """
    found: dict[tuple[Path, str], dict[str, Path]] = {}
    problems = []
    for path in files:
        if name := names.fullmatch(path.name):
            id, part = composed(name[1]), name[2]
            parts = found.setdefault((path.parent, id), {})
            if part in parts:
                what = f"not used, {path.name} is"
                problems.append(Problem(f"{dataset}/{id}", parts[part].name, what, LEFT_OUT))
            parts[part] = path
    for (_, id), parts in found.items():
        if cine not in parts:
            name, what = next(iter(parts.values())).name, f"no {id}_{cine}.nii.gz beside it"
            problems.append(Problem(f"{dataset}/{id}", name, what, LEFT_OUT))
    return [(id, parts) for (_, id), parts in found.items() if cine in parts], problems
