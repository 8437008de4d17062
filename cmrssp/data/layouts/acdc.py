"""The ACDC layout: patientNNN/Info.cfg, _4d.nii.gz and _frameXX_gt.nii.gz with XX from 1."""

import re
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts import by_subject
from cmrssp.data.layouts.csv_table import about, read_text
from cmrssp.data.subject import USED, LabelFile, Problem, Subject

DATASET = "acdc"
NAMES = re.compile(r"(patient\d+)_(4d|frame\d+(?:_gt)?)\.nii(?:\.gz)?")  # of all that belong to the layout
_OFFICIAL_TEST = range(101, 151)


def subjects_among(files: Sequence[Path]) -> tuple[list[Subject], list[Problem]]:
    """The patients among the files of a folder, and what is odd about them. Opens Info.cfg only."""
    found, problems = by_subject(files, NAMES, DATASET, "4d")
    subjects = []
    for patient, parts in found:
        info = parts["4d"].with_name("Info.cfg")
        lines = read_text(info).splitlines() if info.is_file() else ()
        row = {
            key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)
        }
        if not any(row.values()):
            what = "missing or empty: ED and ES are found by the labels alone"
            problems.append(Problem(f"{DATASET}/{patient}", info.name, what, USED))
        drawn = {name: path for name, path in sorted(parts.items()) if name.endswith("_gt")}
        labels = tuple(LabelFile(path, int(name[5:-3]) - 1) for name, path in drawn.items())
        part = "test" if int(patient.removeprefix("patient")) in _OFFICIAL_TEST else ""
        known = {"label_ids": (0, 3, 2, 1), "part": part, **about(row, first_frame=1)}
        subjects.append(Subject(DATASET, patient, parts["4d"], labels, **known))
    return subjects, problems
