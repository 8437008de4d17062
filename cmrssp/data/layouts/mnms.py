"""The M&Ms layout: <ID>_sa.nii.gz and <ID>_sa_gt.nii.gz (both 4D) anywhere below a folder, and one CSV.

As distributed (Training/Labeled, Training/Unlabeled, Validation, Testing) or flat: where a subject lies says
nothing here, its label file does.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts import csv_table
from cmrssp.data.subject import LEFT_OUT, USED, LabelFile, Problem, Subject, frame_number, vendor_name

DATASET = "mnms"
NAMES = re.compile(r".+_sa(_gt)?\.nii(\.gz)?")  # of all NIfTI files that belong to the layout


def find(files: Sequence[Path], dataset: str = DATASET) -> tuple[list[Subject], list[Problem]]:
    """The subjects among the files of a folder. Opens the CSV only."""
    cines = {path: id for path in files if (id := _id(path, "_sa")) is not None}
    if not cines:
        return [], []
    present = set(files)
    table_rows = csv_table.find(files, "External code")
    rows = {row["External code"]: row for row in table_rows or ()}
    subjects, problems = [], []
    for cine, id in cines.items():
        row = rows.get(id, {})
        gt = [p for end in (".nii.gz", ".nii") if (p := cine.with_name(f"{id}_sa_gt{end}")) in present][:1]
        subjects.append(
            Subject(
                dataset=dataset,
                id=id,
                cine=cine,
                labels=tuple(map(LabelFile, gt)),
                vendor=vendor_name(row.get("VendorName") or row.get("Vendor") or ""),
                pathology=row.get("Pathology", ""),
                ed=frame_number(row.get("ED", "")),
                es=frame_number(row.get("ES", "")),
            )
        )
        if rows and not row:
            problems.append(
                Problem(f"{dataset}/{id}", cine.name, "no row in the table: vendor unknown", USED)
            )
    for path in files:
        id = _id(path, "_sa_gt")
        if id is not None and not {path.with_name(f"{id}_sa{end}") for end in (".nii", ".nii.gz")} & present:
            problems.append(Problem(f"{dataset}/{id}", path.name, f"no {id}_sa.nii.gz beside it", LEFT_OUT))
    if table_rows is None:
        problems.append(Problem("", "", f"{dataset}: no CSV with a column 'External code' was found, so "
                                "vendors and pathologies are unknown", USED))  # fmt: skip
    elif missing := csv_table.unmatched(rows, cines.values()):
        problems.append(Problem("", "", f"{dataset}: {missing}", LEFT_OUT))
    return subjects, problems


def _id(path: Path, end: str) -> str | None:
    """What stands before `end` and .nii or .nii.gz in a file's name."""
    for suffix in (f"{end}.nii.gz", f"{end}.nii"):
        if path.name.endswith(suffix) and len(path.name) > len(suffix):
            return path.name.removesuffix(suffix)
    return None
