"""The M&Ms-2 layout: <NNN>_SA_CINE.nii.gz, _SA_ED, _SA_ES, _SA_ED_gt, _SA_ES_gt below a folder, and one CSV.

No file names the cine frames of ED and ES: labels.py compares images. Long-axis files are not used.
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
_KEY = "SUBJECT_CODE"


def subjects_among(files: Sequence[Path]) -> tuple[list[Subject], list[Problem]]:
    """The subjects among the files of a folder, and what is odd about them. Opens the CSV only."""
    parts: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in files:
        if name := _NAME.fullmatch(path.name):
            parts.setdefault((path.parent, name[1].zfill(3)), {})[name[2]] = path
    if not parts:
        return [], []
    rows = csv_table.first_with(files, _KEY, digits=3)
    subjects, problems = [], []
    for (_, code), found in sorted(parts.items()):
        key, row, labels = f"{DATASET}/{code}", (rows or {}).get(code, {}), []
        if "CINE" not in found:
            name = next(iter(found.values())).name
            problems.append(Problem(key, name, f"no {code}_SA_CINE.nii.gz beside it", LEFT_OUT))
            continue
        for phase in ("ED", "ES"):
            if f"{phase}_gt" in found and phase in found:
                labels.append(LabelFile(found[f"{phase}_gt"], image=found[phase], phase=phase))
            elif f"{phase}_gt" in found:
                what = f"no {code}_SA_{phase}.nii.gz beside it, so its frame is not known: not used"
                problems.append(Problem(key, found[f"{phase}_gt"].name, what, LEFT_OUT))
        if rows and not row:
            problems.append(Problem(key, found["CINE"].name, "no row in the table: vendor unknown", USED))
        part = "test" if int(code) in _OFFICIAL_TEST else ""
        about = {"vendor": vendor_name(row.get("VENDOR", "")), "pathology": row.get("DISEASE", "")}
        subjects.append(Subject(DATASET, code, found["CINE"], tuple(labels), part=part, **about))
    return subjects, problems + csv_table.against_cines(rows, (s.id for s in subjects), DATASET, _KEY)
