"""Make golden_dicom.json: the affines, sizes and scalings that dcm2niix gives for DICOM studies.

pip install dcm2niix; python tests/data/golden_dicom.py ../shared/data/sunnybrook (dcm2niix v1.0.20260724)
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import dicom_files as made
import nibabel
import numpy as np

ROWS_AND_COLUMNS = {
    "oblique": (made.ROW, made.COLUMN),
    "oblique, rows reversed": (-made.ROW, made.COLUMN),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "axial": ((1, 0, 0), (0, 1, 0)),
    "axial from below": ((-1, 0, 0), (0, 1, 0)),
}
NAMES = [name + end for name in ROWS_AND_COLUMNS for end in ("", ", backwards")]


def variant(name: str) -> list:
    """The files of a stack; slices are scanned along the normal or `backwards`."""
    cine = made.images()
    row, column = map(np.array, ROWS_AND_COLUMNS[name.removesuffix(", backwards")])
    files = made.stack(cine, Manufacturer="GE MEDICAL SYSTEMS")
    for number, file in enumerate(files):
        z = number // cine.shape[1]
        z = len(cine) - 1 - z if name.endswith("backwards") else z
        for key, value in made.place(z, row, column).items():
            setattr(file, key, value)
    return files


def convert(folder: Path) -> dict:
    with tempfile.TemporaryDirectory() as out:
        program = Path(sys.executable).with_name("dcm2niix")
        subprocess.run([program, "-z", "n", "-b", "n", "-f", "x", "-o", out, folder], check=True)
        (path,) = Path(out).glob("*.nii")
        image = nibabel.load(path)
        voxels = np.asarray(image.dataobj)
        column, row = (size // 2 for size in image.shape[:2])
        middle = voxels[column, row, :, 0].tolist()
        return {"affine": image.affine.tolist(), "shape": list(image.shape), "middle": middle}


if __name__ == "__main__":
    golden = {folder.name: convert(folder / "dicom") for folder in sorted(Path(sys.argv[1]).glob("SCD*"))}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            made.write(Path(folder), variant(name))
            golden[name] = convert(Path(folder))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in golden.items())
    Path(__file__).with_suffix(".json").write_text(f"{{{lines}}}\n")
