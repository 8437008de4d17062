"""NIfTI files: reading what can be read, whatever a header claims, and writing label maps on a file's own
grid.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np

from cmrssp.data.geometry import Geometry
from cmrssp.data.subject import BrokenSubject
from cmrssp.files import atomic

_UNREADABLE = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError,
               struct.error, zlib.error, nibabel.filebasedimages.ImageFileError,
               nibabel.spatialimages.HeaderDataError)  # fmt: skip
nibabel.imageglobals.logger.setLevel("CRITICAL")  # what is odd in a header is reported here, once
_MAX_COMPRESSION = 1032  # of deflate: what a header claims beyond that, the file cannot hold
_STEP_S = (0.005, 0.2)  # between the frames of a cine


@np.errstate(all="ignore")
def load(path: Path) -> nibabel.Nifti1Image:
    """A NIfTI file whose header has been checked against the file's size; its voxels are not read yet."""
    try:
        image = nibabel.load(path, mmap=False)
        kind, shape = image.get_data_dtype(), image.shape
        if len(shape) == 5 and shape[3] == 1:
            shape = (*shape[:3], shape[4])
        if len(shape) not in (3, 4) or min(shape) < 1:
            raise BrokenSubject(f"{path}: expected a 3D or 4D image, got shape {image.shape}")
        if kind.kind not in "iuf":
            raise BrokenSubject(f"{path}: expected grey values, got voxels of type {kind}")
        claimed, size = math.prod(shape) * kind.itemsize, path.stat().st_size
        if claimed > size * (_MAX_COMPRESSION if path.suffix.lower() == ".gz" else 1):
            raise BrokenSubject(
                f"{path}: cannot be read as NIfTI: its header claims {claimed} bytes of voxels, the file has "
                f"{size}"
            )
        return image
    except BrokenSubject:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


@np.errstate(all="ignore")
def voxels(path: Path, image: nibabel.Nifti1Image, *, scaled: bool) -> np.ndarray:
    """(X, Y, Z, T), a 3D file with T = 1; `scaled` by the header's slope and intercept, or as they are
    stored.
    """
    try:
        array = np.asanyarray(image.dataobj) if scaled else image.dataobj.get_unscaled()
        return array.reshape(*image.shape[:3], -1)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def affine_of(image: nibabel.Nifti1Image) -> np.ndarray:
    """The file's 4x4 affine; the qform's where the sform is empty or the identity."""
    qform = image.header.get_qform(coded=True)[0]
    sform = image.affine[:3, :3]
    return qform if qform is not None and (not sform.any() or (sform == np.eye(3)).all()) else image.affine


def _unreadable(path: Path, error: Exception) -> BrokenSubject:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return BrokenSubject(f"{path}: cannot be read as NIfTI, it may be truncated ({why})")


def time_step(image: nibabel.Nifti1Image) -> float | None:
    """Seconds between frames; None where the header does not say it, or nothing that a cine can have."""
    zooms = image.header.get_zooms()
    if len(zooms) < 4:
        return None
    unit = {"msec": 1e-3, "usec": 1e-6}.get(image.header.get_xyzt_units()[1], 1.0)
    for step in (float(zooms[3]) * unit, float(zooms[3]) * 1e-3):  # milliseconds are often called seconds
        if _STEP_S[0] <= step <= _STEP_S[1]:
            return step
    return None


def write_labels(path: Path, labels: np.ndarray, geometry: Geometry, source: Path) -> None:
    """Canonical label maps (T, Z, H, W) as a .nii.gz of uint8 without scaling, in the axes, with the affine,
    voxel sizes and time step of the cine that they belong to; 3D where that is.
    """
    image = nibabel.load(source, mmap=False)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"], header["cal_max"] = 0, 0
    array = np.ascontiguousarray(geometry.from_canonical(labels)).reshape(image.shape)
    labelled = type(image)(array, None, header)  # no affine: the header's stays as it is
    labelled.header.set_slope_inter(1, 0)
    with atomic(path) as file:
        file.write(gzip.compress(labelled.to_bytes(), 1, mtime=0))
