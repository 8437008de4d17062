"""A plain folder: any tree of .nii / .nii.gz cines (4D, or 3D for one frame), labels beside them under the
same name with a suffix, and an optional subjects.csv (subject, vendor, pathology, ed, es, split).
"""

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
    """The cines among the files below `root`, and what is odd about them; files whose name ends in
    `label_suffix` are labels. Opens the CSV only. A subject is called as its file; where two folders hold the
    same name, by the path below `root`. `ignore_split` passes over the table's column `split`.

    Raises UserError for files that look like labels under another suffix: pretraining must not learn from
    them.
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
        id = (
            stem if same[stem] == 1 else csv_table.composed(path.relative_to(root).with_name(stem).as_posix())
        )
        row = rows.get(id) or rows.get(stem, {})
        labels = at.get((path.parent, stem + label_suffix))
        subjects.append(
            Subject(
                dataset=PLAIN,
                id=id,
                cine=path,
                labels=(LabelFile(labels),) if labels else (),
                vendor=vendor_name(row.get("vendor", "")),
                pathology=row.get("pathology", ""),
                ed=frame_number(row.get("ed", "")),
                es=frame_number(row.get("es", "")),
                part=row.get("split", ""),
            )
        )
        missing -= {id, stem}
        if rows and not row:
            problems.append(Problem(f"{PLAIN}/{id}", path.name, f"no row in {TABLE}: vendor unknown", USED))
    for path, stem in stems.items():
        name = stem.removesuffix(label_suffix)
        if path not in cines and (path.parent, name) not in at:
            what = f"no cine {name}.nii.gz beside it"
            problems.append(Problem(f"{PLAIN}/{name}", path.name, what, LEFT_OUT))
    lost = sorted(name for name in missing if rows[name]["split"])
    if lost and any(s.id not in rows and stem_of(s.cine.name) not in rows for s in subjects):
        raise UserError(
            f"{root / TABLE}: gives a split to subjects that have no cine ({', '.join(lost[:8])}), and "
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
    """The name of a NIfTI file, its letters composed, without .nii or .nii.gz, also in capitals; None for any
    other file.
    """
    for end in (".nii.gz", ".nii"):
        if name.lower().endswith(end) and len(name) > len(end):
            return csv_table.composed(name[: -len(end)])
    return None
