"""A plain folder: any tree of .nii / .nii.gz cines (4D, or 3D for one frame), labels beside them under the
same name with a suffix, and an optional subjects.csv (subject, patient, vendor, pathology, ed, es, split).
Files that are named alike but for ED, ES or a frame (also dcm2niix's _t<ms>) are of one patient.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cmrssp.data.layouts import csv_table
from cmrssp.data.subject import LEFT_OUT, PLAIN, USED, LabelFile, Problem, Subject, listed
from cmrssp.errors import UserError

TABLE = "subjects.csv"
_LIKE_LABELS = re.compile(r"(.+)([_-](?:gt|seg|mask|labels?|contour))", re.IGNORECASE | re.DOTALL)
_PHASE = re.compile(r"(^|[/_-])(ed|es|frame[_-]?\d+|(?-i:(?<=_)t\d+))(?=/|$)", re.IGNORECASE)
_FEW = 10  # cines in one folder, fewer than this: they may be of one patient
_PARTS = ("", "train", "validation", "test")


def subjects_among(
    files: Sequence[Path], root: Path, label_suffix: str
) -> tuple[list[Subject], list[Problem]]:
    """The cines among the files below `root`, and what is odd about them. Files whose name ends in
    `label_suffix` are labels. A subject's id is its file's name, or its path if two folders hold the name.
    Opens nothing. Raises UserError for files that look like labels with another suffix: pretraining must not
    see them.
    """
    at = {(path.parent, stem): path for path in files if (stem := stem_of(path.name)) is not None}
    cines = [place for place in at if not place[1].endswith(label_suffix)]
    for folder, stem in cines:
        if (alike := _LIKE_LABELS.fullmatch(stem)) and (folder, alike[1]) in at:
            raise UserError(
                f"{at[folder, stem]}: looks like labels of {alike[1]}; expected their names to end in "
                f"{label_suffix}, else say --label-suffix={alike[2]}"
            )
    same = Counter(stem for _, stem in cines)
    subjects, problems = [], []
    for folder, stem in cines:
        place = csv_table.composed((folder / stem).relative_to(root).as_posix())
        id = stem if same[stem] == 1 else place
        label = at.get((folder, stem + label_suffix))
        named = [name.upper() for _, name in _PHASE.findall(place)]
        phase = next((name for name in reversed(named) if name in ("ED", "ES")), "")
        labels = (LabelFile(label, phase=phase),) if label else ()
        subjects.append(Subject(PLAIN, id, at[folder, stem], labels, patient=_PHASE.sub("", place)))
    for folder, stem in at:
        name = stem.removesuffix(label_suffix)
        if name != stem and (folder, name) not in at:
            what = f"no cine {name}.nii.gz beside it"
            problems.append(Problem(f"{PLAIN}/{name}", at[folder, stem].name, what, LEFT_OUT))
    return subjects, problems


def with_table(
    subjects: Sequence[Subject], root: Path, *, ignore_split: bool
) -> tuple[list[Subject], list[Problem]]:
    """The subjects with what root/subjects.csv, if there is one, says in the row of their id, and how the
    table differs from them. `ignore_split` ignores its column `split`.
    """
    rows = _rows(root / TABLE, ignore_split)
    doubts = [] if any(row.get("patient") for row in rows.values()) else _who_is_whom(subjects, root)
    if not rows:
        return list(subjects), doubts
    found = {subject.id: (subject.key, subject.cine) for subject in subjects}
    lost = sorted(id for id, row in rows.items() if row["split"] and id not in found)
    if lost and (rest := sorted(found.keys() - rows.keys())):
        raise UserError(
            f"{root / TABLE}: gives a split to subjects that have no cine ({listed(lost)}), and "
            f"there are cines without a row ({listed(rest)}); expected these names (mind leading zeros)"
        )
    told = []
    for subject in subjects:
        row = rows.get(subject.id, {})
        known = {**csv_table.about(row), "part": row.get("split"), "patient": row.get("patient")}
        told.append(replace(subject, **{k: v for k, v in known.items() if v not in ("", None)}))
    return told, [*doubts, *csv_table.differences(root / TABLE, rows, found)]


def _who_is_whom(subjects: Sequence[Subject], root: Path) -> list[Problem]:
    """A doubt if several folders look like those of one patient each, with more than one cine."""
    places = {(s.cine.parent, s.patient) for s in subjects if s.dataset == PLAIN}
    held = Counter(folder for folder, _ in places)
    several = sorted(folder for folder, count in held.items() if folder != root and 1 < count < _FEW)
    if len(several) < 2:
        return []
    such = f"{len(several)} folders, such as {several[0].relative_to(root)}"
    what = f"{such}, hold a few cines each, which count as different patients; a {TABLE} can say who is whom"
    return [Problem("", root.name, what, USED)]


def _rows(path: Path, ignore_split: bool) -> csv_table.Rows:
    """{subject: its row of the table}; {} without a table. Raises UserError for a wrong one."""
    rows = csv_table.read(path, "subject") if path.is_file() else []
    if rows is None:
        expected = "expected the columns subject, patient, vendor, pathology, ed, es, split"
        raise UserError(f"{path}: {expected} (all but the first may be missing), got no column 'subject'")
    by_subject: csv_table.Rows = {}
    for row in rows:
        subject, part = row["subject"], "" if ignore_split else row.get("split", "").lower()
        part = "validation" if part in ("val", "valid") else part
        if subject in by_subject:
            raise UserError(f"{path}: expected one row a subject, got several of {subject}")
        if part not in _PARTS:
            expected = "expected train, validation, test or nothing"
            raise UserError(f"{path}: {expected} as split of {subject}, got {part}")
        by_subject[subject] = {**row, "split": part}
    return by_subject


def stem_of(name: str) -> str | None:
    """The name of a NIfTI file without .nii or .nii.gz (also in capitals), `composed`; None for others."""
    stem = re.fullmatch(r"(.+?)\.nii(\.gz)?", name, re.IGNORECASE | re.DOTALL)
    return csv_table.composed(stem[1]) if stem else None
