"""The M&Ms-2 layout: <NNN>_SA_CINE.nii.gz, _SA_ED, _SA_ES, _SA_ED_gt, _SA_ES_gt below a folder, and one CSV.

Which frames of the cine ED and ES are is written nowhere: it is found by comparing images (labels.py).
Long-axis files are not used.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts import csv_table
from cmrssp.data.subject import LEFT_OUT, USED, LabelFile, Problem, Subject, vendor_name

DATASET = "mnms2"
MAY_REPEAT_MNMS = ("NOR", "HCM", "LV")  # diseases of the subjects that the paper leaves out (section 2.1)
NAMES = re.compile(r"\d+_(SA|LA)_.+\.nii(\.gz)?")  # of all NIfTI files that belong to the layout
_OFFICIAL_TEST = range(201, 361)
_NAME = re.compile(r"(\d+)_SA_(CINE|ED|ES|ED_gt|ES_gt)\.nii(\.gz)?")


def find(files: Sequence[Path]) -> tuple[list[Subject], list[Problem]]:
    """The subjects among the files of a folder. Opens the CSV only."""
    parts: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in files:
        if name := _NAME.fullmatch(path.name):
            parts.setdefault((path.parent, name[1].zfill(3)), {})[name[2]] = path
    if not parts:
        return [], []
    table_rows = csv_table.find(files, "SUBJECT_CODE")
    rows = {row["SUBJECT_CODE"].zfill(3): row for row in table_rows or ()}
    subjects, problems = [], []
    for (_, code), found in sorted(parts.items()):
        key = f"{DATASET}/{code}"
        if "CINE" not in found:
            name = next(iter(found.values())).name
            problems.append(Problem(key, name, f"no {code}_SA_CINE.nii.gz beside it", LEFT_OUT))
            continue
        labels = []
        for phase in ("ED", "ES"):
            if f"{phase}_gt" in found and phase in found:
                labels.append(LabelFile(found[f"{phase}_gt"], image=found[phase], phase=phase))
            elif f"{phase}_gt" in found:
                what = f"no {code}_SA_{phase}.nii.gz beside it, so its frame is not known: not used"
                problems.append(Problem(key, found[f"{phase}_gt"].name, what, LEFT_OUT))
        row = rows.get(code, {})
        if rows and not row:
            problems.append(Problem(key, found["CINE"].name, "no row in the table: vendor unknown", USED))
        subjects.append(
            Subject(
                dataset=DATASET,
                id=code,
                cine=found["CINE"],
                labels=tuple(labels),
                vendor=vendor_name(row.get("VENDOR", "")),
                pathology=row.get("DISEASE", ""),
                part="test" if int(code) in _OFFICIAL_TEST else "",
            )
        )
    if table_rows is None:
        problems.append(Problem("", "", "mnms2: no CSV with a column 'SUBJECT_CODE' was found, so vendors "
                                "and diseases are unknown", USED))  # fmt: skip
    elif missing := csv_table.unmatched(rows, (s.id for s in subjects)):
        problems.append(Problem("", "", f"mnms2: {missing}", LEFT_OUT))
    return subjects, problems
