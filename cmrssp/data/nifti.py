"""NIfTI files: reading them whatever a header claims, and writing label maps on a file's own grid."""

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nibabel
import numpy as np

from cmrssp.data import plausibility
from cmrssp.data.geometry import Geometry
from cmrssp.data.subject import CORRECTED, USED, BrokenSubject, Finding, Subject
from cmrssp.files import atomic

nibabel.imageglobals.logger.setLevel("CRITICAL")  # the data report names what is odd in a header, once
_MAX_COMPRESSION = 1032  # of deflate: no file holds more than its size times this
# of the codes in xyzt_units; of all others mm and seconds
_MM, _SECONDS = {1: 1000.0, 3: 0.001}, {16: 1e-3, 24: 1e-6}


def cine_image(subject: Subject) -> nibabel.Nifti1Image:
    """The cine of a subject, from NIfTI or DICOM. Raises BrokenSubject."""
    return subject.source.image() if subject.source else load(subject.cine)


@np.errstate(all="ignore")
def load(path: Path) -> nibabel.Nifti1Image:
    """Open a NIfTI file without reading its voxels. Raises BrokenSubject for anything but a 3D or 4D image of
    numbers, and for a header that claims more than the file holds.
    """
    with _readable(path):
        image = nibabel.load(path, mmap=False)
        kind, shape = image.get_data_dtype(), image.shape
        if sum(n != 1 for n in shape[3:]) > 1 or len(shape) < 3 or min(shape) < 1 or kind.kind not in "iuf":
            raise BrokenSubject(f"{path}: expected a 3D or 4D image of grey values, got {kind} {shape}")
        claimed, size = math.prod(shape) * kind.itemsize, path.stat().st_size
        if claimed > size * (_MAX_COMPRESSION if path.suffix.lower() == ".gz" else 1):
            raise ValueError(f"its header claims {claimed} bytes of voxels, the file has {size}")
        return image


@np.errstate(all="ignore")
def voxels(path: Path, image: nibabel.Nifti1Image, *, scaled: bool) -> np.ndarray:
    """(X, Y, Z, T), `scaled` by the header's slope and intercept, or as stored. Raises BrokenSubject."""
    with _readable(path):
        array = np.asanyarray(image.dataobj) if scaled else image.dataobj.get_unscaled()
        return array.reshape(*image.shape[:3], -1)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except BrokenSubject:
        raise
    except Exception as error:  # a broken file makes nibabel raise anything
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise BrokenSubject(f"{path}: cannot be read as NIfTI, it may be truncated ({why})") from None


def grid(image: nibabel.Nifti1Image) -> tuple[np.ndarray, np.ndarray, list[Finding]]:
    """The 4x4 affine and the voxel sizes (3,) of a file, both in mm, and what is odd about their unit. The
    affine is the sform, or the qform if the sform is empty, the identity, or holds voxel sizes alone.
    """
    affine, qform = image.affine, None
    with suppress(ValueError, nibabel.spatialimages.HeaderDataError):  # no unit quaternion
        qform = image.header.get_qform(coded=True)[0]
    turn = affine[:3, :3]
    sizes_alone = (turn == np.diag(np.abs(np.diag(turn)))).all() and not affine[:3, 3].any()
    if qform is not None and (sizes_alone or (turn == np.eye(3)).all()):
        affine = qform
    zooms = np.abs(np.asarray(image.header.get_zooms()[:3], float))
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    unit = _MM.get(int(image.header["xyzt_units"]) & 7, 1.0)
    factor, odd = plausibility.millimetres(lengths if lengths.any() else zooms, unit)
    return np.diag([factor, factor, factor, 1.0]) @ affine, zooms * factor, odd


def time_step(image: nibabel.Nifti1Image) -> tuple[float | None, list[Finding]]:
    """Seconds between frames (None for a 3D file or an implausible step), and what is odd about them."""
    if image.ndim < 4:
        return None, []
    number, unit_s = float(image.header["pixdim"][4]), _SECONDS.get(int(image.header["xyzt_units"]) & 56, 1.0)
    low, high = plausibility.STEP_S
    for unit in (unit_s, 1.0, 1e-3, 1e-6):
        if low <= number * unit <= high:
            what = f"a time step of {number:.4g} does not fit its unit: read as {number * unit:.4g} s"
            return number * unit, [] if unit == unit_s else [(what, CORRECTED)]
    unset = number in (0, 1) or not np.isfinite(number)  # 0 and 1 are defaults of writers
    what = f"a time step of {number * unit_s:.4g} s is not a cine's: no heart rate is given"
    return None, [] if unset else [(what, USED)]


def write_labels(path: Path, labels: np.ndarray, geometry: Geometry, image: nibabel.Nifti1Image) -> None:
    """Write canonical label maps (T, Z, H, W) as a .nii.gz of uint8 with the grid and times of `image`."""
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"], header["cal_max"] = 0, 0
    array = np.ascontiguousarray(geometry.from_canonical(labels)).reshape(image.shape)
    labelled = type(image)(array, None, header)  # no affine: the header's stays as it is
    labelled.header.set_slope_inter(1, 0)
    with atomic(path) as file:
        file.write(gzip.compress(labelled.to_bytes(), 1, mtime=0))
