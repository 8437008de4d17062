"""The M&Ms layout: <ID>_sa.nii.gz and <ID>_sa_gt.nii.gz (both 4D) anywhere below a folder, and one CSV.

A subject is labelled if it has a label file, whatever its folder (Training/Labeled, Testing, ...).
"""

import re
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts import by_subject
from cmrssp.data.layouts.csv_table import about, topmost
from cmrssp.data.subject import LabelFile, Problem, Subject

DATASET = "mnms"
NAMES = re.compile(r"(.+)_(sa|sa_gt)\.nii(\.gz)?")  # of all NIfTI files that belong to the layout


def subjects_among(files: Sequence[Path], dataset: str = DATASET) -> tuple[list[Subject], list[Problem]]:
    """The subjects among the files of a folder, and what is odd about them. Opens the CSV only."""
    found, problems = by_subject(files, NAMES, dataset, "sa")
    if not found:
        return [], problems
    rows, odd = topmost(files, "External code", {id: parts["sa"] for id, parts in found}, dataset)
    subjects = []
    for id, parts in found:
        labels = (LabelFile(parts["sa_gt"]),) if "sa_gt" in parts else ()
        subjects.append(Subject(dataset, id, parts["sa"], labels, **about(rows.get(id, {}))))
    return subjects, problems + odd
