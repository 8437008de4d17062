"""The M&Ms layout: <ID>_sa.nii.gz and <ID>_sa_gt.nii.gz (both 4D) anywhere below a folder, and one CSV.

A subject is labelled if it has a label file, whatever its folder (Training/Labeled, Testing, ...).
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
    rows = csv_table.first_with(files, _KEY)
    subjects, problems = [], []
    for cine, id in cines.items():
        row, label = (rows or {}).get(id, {}), labels.get((cine.parent, id))
        vendor = vendor_name(row.get("VendorName") or row.get("Vendor") or "")
        about = {"vendor": vendor, "pathology": row.get("Pathology", "")}
        phases = {phase.lower(): frame_number(row.get(phase, "")) for phase in ("ED", "ES")}
        own = (LabelFile(label),) if label else ()
        subjects.append(Subject(dataset, id, cine, own, **about, **phases))
        if rows and not row:
            problems.append(Problem(subjects[-1].key, cine.name, "no row in the table: vendor unknown", USED))
    with_cine = {(path.parent, id) for path, id in cines.items()}
    for (folder, id), path in labels.items():
        if (folder, id) not in with_cine:
            problems.append(Problem(f"{dataset}/{id}", path.name, f"no {id}_sa.nii.gz beside it", LEFT_OUT))
    return subjects, problems + csv_table.against_cines(rows, cines.values(), dataset, _KEY)
