"""The ACDC layout: patientNNN/Info.cfg, _4d.nii.gz and _frameXX_gt.nii.gz with XX from 1."""

import re
from collections.abc import Sequence
from pathlib import Path

from cmrssp.data.layouts.csv_table import read_text
from cmrssp.data.subject import LEFT_OUT, USED, LabelFile, Problem, Subject, frame_number

DATASET = "acdc"
NAMES = re.compile(r"(patient\d+)_(4d|frame\d+(?:_gt)?)\.nii(?:\.gz)?")  # of all that belong to the layout
_OFFICIAL_TEST = range(101, 151)


def subjects_among(files: Sequence[Path]) -> tuple[list[Subject], list[Problem]]:
    """The patients among the files of a folder, and what is odd about them. Opens Info.cfg only."""
    parts: dict[tuple[Path, str], dict[str, Path]] = {}
    problems: list[Problem] = []
    for path in files:
        if name := NAMES.fullmatch(path.name):
            own = parts.setdefault((path.parent, name[1]), {})
            if name[2] in own:  # .nii beside .nii.gz
                what = f"not used, {path.name} is"
                problems.append(Problem(f"{DATASET}/{name[1]}", own[name[2]].name, what, LEFT_OUT))
            own[name[2]] = path
    subjects = []
    for (folder, patient), found in sorted(parts.items()):
        key = f"{DATASET}/{patient}"
        if "4d" not in found:
            name = next(iter(found.values())).name
            problems.append(Problem(key, name, f"no {patient}_4d.nii.gz beside it", LEFT_OUT))
            continue
        info = _info(folder / "Info.cfg")
        if not info:
            what = "missing or empty: ED and ES are found by the labels alone"
            problems.append(Problem(key, "Info.cfg", what, USED))
        gt = {name: path for name, path in sorted(found.items()) if name.endswith("_gt")}
        labels = tuple(LabelFile(path, int(name[5:-3]) - 1) for name, path in gt.items())
        about = {"label_ids": (0, 3, 2, 1), "pathology": info.get("Group", "")}
        phases = {phase.lower(): frame_number(info.get(phase, ""), first=1) for phase in ("ED", "ES")}
        part = "test" if int(patient.removeprefix("patient")) in _OFFICIAL_TEST else ""
        subjects.append(Subject(DATASET, patient, found["4d"], labels, part=part, **about, **phases))
    return subjects, problems


def _info(path: Path) -> dict[str, str]:
    """`key: value` lines; {} without a file."""
    lines = read_text(path).splitlines() if path.is_file() else ()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}
