"""The M&Ms-2 layout: <NNN>_SA_CINE.nii.gz, _SA_ED, _SA_ES, _SA_ED_gt, _SA_ES_gt below a folder, and one CSV.

No file names the cine frames of ED and ES: labels.py compares images. Long-axis files are not used.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts import by_subject
from cmrssp.data.layouts.csv_table import about, topmost
from cmrssp.data.subject import LEFT_OUT, LabelFile, Problem, Subject

DATASET = "mnms2"
MAY_REPEAT_MNMS = ("NOR", "HCM", "LV")  # diseases of the subjects that the paper leaves out (section 2.1)
NAMES = re.compile(r"\d+_(SA|LA)_.+\.nii(\.gz)?")  # of all NIfTI files that belong to the layout
_OFFICIAL_TEST = range(201, 361)
_USED = re.compile(r"(\d+)_(SA_CINE|SA_ED|SA_ES|SA_ED_gt|SA_ES_gt)\.nii(\.gz)?")


def subjects_among(files: Sequence[Path]) -> tuple[list[Subject], list[Problem]]:
    """The subjects among the files of a folder, and what is odd about them. Opens the CSV only."""
    found, problems = by_subject(files, _USED, DATASET, "SA_CINE")
    if not found:
        return [], problems
    cines = {code: parts["SA_CINE"] for code, parts in found}
    rows, odd = topmost(files, "SUBJECT_CODE", cines, DATASET, digits=3)
    subjects = []
    for code, parts in found:
        labels = []
        for phase in ("ED", "ES"):
            image, drawn = parts.get(f"SA_{phase}"), parts.get(f"SA_{phase}_gt")
            if image and drawn:
                labels.append(LabelFile(drawn, image=image, phase=phase))
            elif drawn:
                what = f"no {code}_SA_{phase}.nii.gz beside it, so its frame is not known: not used"
                problems.append(Problem(f"{DATASET}/{code}", drawn.name, what, LEFT_OUT))
        known = {"part": "test" if int(code) in _OFFICIAL_TEST else "", **about(rows.get(code, {}))}
        subjects.append(Subject(DATASET, code, cines[code], tuple(labels), **known))
    return subjects, problems + odd
