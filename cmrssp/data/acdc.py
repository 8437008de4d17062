"""The ACDC layout: patientNNN/Info.cfg, patientNNN_4d.nii.gz, patientNNN_frameXX_gt.nii.gz (XX counts from
1).
"""

import re
from pathlib import Path

from cmrssp.data.subject import LabelFile, Subject
from cmrssp.files import below

DATASET = "acdc"
_OFFICIAL_TEST = range(101, 151)


def find(root: Path) -> list[Subject]:
    """All patients below `root`, [] if it is not an ACDC folder. Opens Info.cfg only."""
    cines = below(root, ("_4d.nii.gz", "_4d.nii"))
    return [_subject(cine) for cine in cines if cine.name.startswith("patient")]


def _subject(cine: Path) -> Subject:
    patient = cine.name.split("_4d.nii")[0]
    labels = []
    for path in sorted(cine.parent.glob(f"{patient}_frame*_gt.nii*")):
        number = re.fullmatch(rf"{re.escape(patient)}_frame(\d+)_gt\.nii(\.gz)?", path.name)
        if number:
            labels.append(LabelFile(path, int(number[1]) - 1))
    info = _info(cine.parent / "Info.cfg")
    ed, es = (int(info[k]) - 1 if info.get(k, "").isdigit() else None for k in ("ED", "ES"))
    digits = patient.removeprefix("patient")
    return Subject(
        dataset=DATASET,
        id=patient,
        cine=cine,
        labels=tuple(labels),
        label_ids=(0, 3, 2, 1),
        pathology=info.get("Group", ""),
        ed=ed,
        es=es,
        official_test=digits.isdigit() and int(digits) in _OFFICIAL_TEST,
    )


def _info(path: Path) -> dict[str, str]:
    """`key: value` lines; {} where the file is missing."""
    if not path.is_file():
        return {}
    pairs = (line.split(":", 1) for line in path.read_text(errors="replace").splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
