"""The M&Ms layout: <ID>_sa.nii.gz and <ID>_sa_gt.nii.gz (both 4D) anywhere below a folder, and one CSV.

Whether a subject is labelled depends on its label file alone, not on its folder (Training/Labeled, Testing
...).
"""

import re
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts import csv_table
from cmrssp.data.subject import LEFT_OUT, USED, LabelFile, Problem, Subject, frame_number, vendor_name

DATASET = "mnms"
NAMES = re.compile(r"(.+)_sa(_gt)?\.nii(\.gz)?")  # of all NIfTI files that belong to the layout
_KEY = "External code"


def subjects_among(files: Sequence[Path], dataset: str = DATASET) -> tuple[list[Subject], list[Problem]]:
    """The subjects among the files of a folder, and what is odd about them. Opens the CSV only."""
    cines: dict[Path, str] = {}
    labels: dict[tuple[Path, str], Path] = {}
    for path in files:
        if name := NAMES.fullmatch(path.name):
            id = csv_table.composed(name[1])
            if name[2]:
                labels[path.parent, id] = path
            else:
                cines[path] = id
    if not cines:
        return [], []
    table = csv_table.first_with(files, _KEY)
    rows = {row[_KEY]: row for row in table or ()}
    subjects, problems = [], []
    for cine, id in cines.items():
        row, label = rows.get(id, {}), labels.get((cine.parent, id))
        subjects.append(
            Subject(
                dataset=dataset,
                id=id,
                cine=cine,
                labels=(LabelFile(label),) if label else (),
                vendor=vendor_name(row.get("VendorName") or row.get("Vendor") or ""),
                pathology=row.get("Pathology", ""),
                ed=frame_number(row.get("ED", "")),
                es=frame_number(row.get("ES", "")),
            )
        )
        if rows and not row:
            what = "no row in the table: vendor unknown"
            problems.append(Problem(f"{dataset}/{id}", cine.name, what, USED))
    with_cine = {(path.parent, id) for path, id in cines.items()}
    for (folder, id), path in labels.items():
        if (folder, id) not in with_cine:
            problems.append(Problem(f"{dataset}/{id}", path.name, f"no {id}_sa.nii.gz beside it", LEFT_OUT))
    known = None if table is None else rows
    return subjects, problems + csv_table.against_cines(known, cines.values(), dataset, _KEY)
