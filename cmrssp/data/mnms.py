"""The M&Ms layout: <ID>_sa.nii.gz and <ID>_sa_gt.nii.gz (both 4D) anywhere below a folder, and one CSV.

As distributed (Training/Labeled, Training/Unlabeled, Validation, Testing) or flat: where a subject lies says
nothing here, its label file does.
"""

import csv
from pathlib import Path

from cmrssp.data.subject import LabelFile, Subject
from cmrssp.files import below

DATASET = "mnms"


def find(root: Path, dataset: str = DATASET) -> list[Subject]:
    """All subjects below `root`, [] if it is not an M&Ms folder. Opens the CSV only."""
    table = _table(root)
    subjects = []
    for cine in below(root, ("_sa.nii.gz", "_sa.nii")):
        id, suffix = cine.name.split("_sa.nii")[0], cine.name.split("_sa", 1)[1]
        row = table.get(id, {})
        gt = cine.with_name(f"{id}_sa_gt{suffix}")
        subjects.append(
            Subject(
                dataset=dataset,
                id=id,
                cine=cine,
                labels=(LabelFile(gt),) if gt.is_file() else (),
                vendor=row.get("VendorName") or row.get("Vendor") or "",
                pathology=row.get("Pathology") or "",
                ed=_frame(row, "ED"),
                es=_frame(row, "ES"),
            )
        )
    return subjects


def _table(root: Path) -> dict[str, dict[str, str]]:
    """The rows of the CSV in `root` that has an `External code` column, by that code; {} where there is none.
    """
    for path in sorted(root.glob("*.csv")):
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = list(csv.DictReader(file))
        if rows and "External code" in rows[0]:
            return {row["External code"].strip(): row for row in rows if (row["External code"] or "").strip()}
    return {}


def _frame(row: dict[str, str], column: str) -> int | None:
    try:
        return int(float(row.get(column) or ""))
    except (ValueError, OverflowError):
        return None
