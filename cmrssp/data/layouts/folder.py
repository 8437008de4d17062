"""A plain folder: any tree of .nii / .nii.gz cines (4D, or 3D for one frame), labels beside them under the
same name with a suffix, and an optional subjects.csv (subject, vendor, pathology, ed, es, split).
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts import csv_table
from cmrssp.data.subject import LEFT_OUT, PLAIN, USED, LabelFile, Problem, Subject, frame_number, vendor_name
from cmrssp.errors import UserError

TABLE = "subjects.csv"
_WORDS = ("gt", "seg", "mask", "label", "labels", "contour")
_LIKE_LABELS = [mark + word for mark in "_-" for word in _WORDS]
_PARTS = {"": "", "train": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "test": "test"}  # fmt: skip


def subjects_among(
    files: Sequence[Path], root: Path, label_suffix: str, *, ignore_split: bool = False
) -> tuple[list[Subject], list[Problem]]:
    """The cines among the files below `root`, and what is odd about them. Files whose name ends in
    `label_suffix` are labels. A subject's id is its file's name, or its path below `root` if two folders hold
    the name. Opens the CSV only; `ignore_split` ignores its column `split`.

    Raises UserError for files that look like labels with another suffix: pretraining must not see them.
    """
    stems = {path: stem for path in files if (stem := stem_of(path.name)) is not None}
    cines = {path: stem for path, stem in stems.items() if not stem.endswith(label_suffix)}
    at = {(path.parent, stem): path for path, stem in stems.items()}
    for path, stem in cines.items():
        for end in _LIKE_LABELS:
            if stem.lower().endswith(end) and (path.parent, stem[: -len(end)]) in at:
                raise UserError(
                    f"{path}: looks like labels of {stem[: -len(end)]}; expected their names to end in "
                    f"{label_suffix}, else say --label-suffix {stem[-len(end) :]}"
                )
    same = Counter(cines.values())
    rows = _rows(root, ignore_split)
    missing = set(rows)
    subjects, problems = [], []
    for path, stem in cines.items():
        place = csv_table.composed(path.relative_to(root).with_name(stem).as_posix())
        id = stem if same[stem] == 1 else place
        row = rows.get(id) or rows.get(stem, {})
        label = at.get((path.parent, stem + label_suffix))
        about = {"vendor": vendor_name(row.get("vendor", "")), "pathology": row.get("pathology", "")}
        phases = {phase: frame_number(row.get(phase, "")) for phase in ("ed", "es")}
        own = (LabelFile(label),) if label else ()
        subjects.append(Subject(PLAIN, id, path, own, part=row.get("split", ""), **about, **phases))
        missing -= {id, stem}
        if rows and not row:
            problems.append(Problem(f"{PLAIN}/{id}", path.name, f"no row in {TABLE}: vendor unknown", USED))
    for path, stem in stems.items():
        name = stem.removesuffix(label_suffix)
        if path not in cines and (path.parent, name) not in at:
            problems.append(
                Problem(f"{PLAIN}/{name}", path.name, f"no cine {name}.nii.gz beside it", LEFT_OUT)
            )
    lost = sorted(name for name in missing if rows[name]["split"])
    if lost and any(s.id not in rows and stem_of(s.cine.name) not in rows for s in subjects):
        raise UserError(
            f"{root / TABLE}: gives a split to subjects that have no cine ({csv_table.first(lost)}), and "
            "there are cines without a row; expected the files' names without .nii.gz (mind leading zeros)"
        )
    if missing:
        problems.append(Problem("", TABLE, csv_table.without_cine(missing, ()), LEFT_OUT))
    return subjects, problems


def _rows(root: Path, ignore_split: bool) -> dict[str, dict[str, str]]:
    """{subject: its row of the table}; {} without a table. Raises UserError for a wrong one."""
    path = root / TABLE
    if not path.is_file():
        return {}
    rows = csv_table.read(path, "subject", lower=True)
    if rows is None:
        raise UserError(f"{path}: expected the columns subject, vendor, pathology, ed, es, split (all but "
                        "the first may be missing), got no column 'subject'")  # fmt: skip
    counts = Counter(row["subject"] for row in rows)
    if twice := sorted(subject for subject, count in counts.items() if count > 1):
        raise UserError(f"{path}: expected one row a subject, got {counts[twice[0]]} of {twice[0]}")
    for row in rows:
        part = "" if ignore_split else row.get("split", "").lower()
        if part not in _PARTS:
            raise UserError(f"{path}: expected train, validation, test or nothing as split of "
                            f"{row['subject']}, got {row['split']}")  # fmt: skip
        row["split"] = _PARTS[part]
    return {row["subject"]: row for row in rows}


def stem_of(name: str) -> str | None:
    """The name of a NIfTI file without .nii or .nii.gz (also in capitals), `composed`; None for others."""
    stem = re.fullmatch(r"(.+?)\.nii(\.gz)?", name, re.IGNORECASE | re.DOTALL)
    return csv_table.composed(stem[1]) if stem else None
