"""One subject on disk: its record, its files, and the geometry that makes all cines alike.

A cine leaves this module as (T, Z, H, W): slices from base to apex, rows towards the patient's back (or
feet), columns towards the patient's left, as far as the affine says. Axes are only swapped and reversed,
never interpolated.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter

from cmrssp.errors import UserError

CLASSES = ("LV", "MYO", "RV")  # label ids 1, 2, 3 everywhere in this package, as in M&Ms
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    zlib.error,
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
)

# Directions in RAS+ (nibabel's world): the apex lies to the patient's left, front and feet.
_APEX = np.array([-1.0, 1.0, -1.0]) / np.sqrt(3)
_LEFT = np.array([-1.0, 0.0, 0.0])
_BACK_AND_FEET = np.array([0.0, -1.0, -1.0]) / np.sqrt(2)
_MIN_SLICE_COSINE = 0.7  # below, the affine says nothing of the slice order (axis-aligned: 0.58)


class BrokenSubject(UserError):
    """A subject that cannot be used; the message names the file, what was expected and what was found."""


@dataclass(frozen=True)
class LabelFile:
    path: Path
    frame: int | None = None  # 0-based cine frame of a 3D file; None: a 4D file that goes with the cine


@dataclass(frozen=True)
class Subject:
    """What a layout knows of a subject without opening an image. Nothing here is read from a label file."""

    dataset: str
    id: str
    cine: Path
    labels: tuple[LabelFile, ...] = ()
    label_ids: tuple[int, ...] = (0, 1, 2, 3)  # our id of each id in the file
    vendor: str = ""
    pathology: str = ""
    ed: int | None = None  # 0-based frames according to the data set's table
    es: int | None = None
    official_test: bool = False

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.id}"


@dataclass(frozen=True)
class Geometry:
    """Maps a file's array (X, Y, Z, T) to canonical (T, Z, H, W) and back; lengths in mm."""

    rows_axis: int  # which axis of the file, 0 or 1, becomes the rows
    flip: tuple[bool, bool, bool]  # slices, rows, columns reversed
    spacing_mm: tuple[float, float]  # rows, columns
    slice_pitch_mm: float

    @classmethod
    def from_affine(cls, affine: np.ndarray) -> "Geometry":
        """From a 4x4 RAS+ affine. Slice order: positive cosine with the apex direction is base -> apex."""
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if not (np.isfinite(affine).all() and (lengths > 0).all()):
            raise ValueError(
                f"expected an affine with three axes of finite length, got lengths {lengths.tolist()}"
            )
        unit = affine[:3, :3] / lengths

        def fit(rows: int, columns: int) -> float:
            return abs(unit[:, rows] @ _BACK_AND_FEET) + abs(unit[:, columns] @ _LEFT)

        rows, columns = (1, 0) if fit(1, 0) >= fit(0, 1) else (0, 1)
        flip = (
            bool(unit[:, 2] @ _APEX <= -_MIN_SLICE_COSINE),
            bool(unit[:, rows] @ _BACK_AND_FEET < 0),
            bool(unit[:, columns] @ _LEFT < 0),
        )
        return cls(rows, flip, (float(lengths[rows]), float(lengths[columns])), float(lengths[2]))

    def to_canonical(self, array: np.ndarray) -> np.ndarray:
        """(X, Y, Z, T) -> (T, Z, H, W), a view."""
        order = (3, 2, 0, 1) if self.rows_axis == 0 else (3, 2, 1, 0)
        return np.flip(array.transpose(order), self._flipped_axes())

    def from_canonical(self, array: np.ndarray) -> np.ndarray:
        """(T, Z, H, W) -> (X, Y, Z, T), a view: the inverse of `to_canonical`."""
        order = (2, 3, 1, 0) if self.rows_axis == 0 else (3, 2, 1, 0)
        return np.flip(array, self._flipped_axes()).transpose(order)

    def _flipped_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis, flipped in enumerate(self.flip, start=1) if flipped)


@dataclass(frozen=True)
class Cine:
    """One read cine. `stored = (raw - minimum) * scale`; scale is 1 for whole numbers that fit int16."""

    stored: np.ndarray  # (T, Z, H, W) int16, not negative
    geometry: Geometry
    minimum: float
    scale: float
    centre: tuple[float, float]  # crop centre, (row, column) in native pixels
    mean: float
    std: float
    max: float


@dataclass(frozen=True)
class Labels:
    """The labelled frames of one subject: (F, Z, H, W) uint8 with ids 0..3, and the cine frame of each."""

    masks: np.ndarray
    frames: tuple[int, ...]
    ed: int | None  # cine frames of end diastole and end systole, None where unlabelled
    es: int | None
    problems: tuple[str, ...] = ()


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI file as a 4D array (X, Y, Z, T), a 3D one with T = 1, and its affine."""
    try:
        image = nibabel.load(path)
        if len(image.shape) not in (3, 4) or 0 in image.shape:
            raise BrokenSubject(f"{path}: expected a 3D or 4D image, got shape {image.shape}")
        array = np.asanyarray(image.dataobj)
        return array.reshape(*image.shape[:3], -1), image.affine
    except BrokenSubject:
        raise
    except UNREADABLE as error:
        raise BrokenSubject(f"{path}: cannot be read as NIfTI, it may be truncated ({error})") from None


def read_cine(subject: Subject) -> Cine:
    """Read, make uniform and measure one cine. Raises BrokenSubject. Opens no label file."""
    array, affine = _read(subject.cine)
    if not np.isfinite(array).all():
        raise BrokenSubject(f"{subject.cine}: expected finite intensities, got NaN or infinity")
    try:
        geometry = Geometry.from_affine(affine)
    except ValueError as error:
        raise BrokenSubject(f"{subject.cine}: {error}") from None
    array = geometry.to_canonical(array)
    minimum, maximum = float(array.min()), float(array.max())
    if minimum == maximum:
        raise BrokenSubject(f"{subject.cine}: expected an image, got the constant {minimum:g} everywhere")
    whole = np.issubdtype(array.dtype, np.integer) or bool((array == np.round(array)).all())
    scale = 1.0 if whole and maximum - minimum <= 32767 else 32767 / (maximum - minimum)
    if whole and scale == 1.0:
        stored = (array.astype(np.int32) - int(minimum)).astype(np.int16)
    else:
        stored = np.round((array.astype(np.float64) - minimum) * scale).astype(np.int16)
    mean, std = intensity_statistics(stored)
    return Cine(
        np.ascontiguousarray(stored),
        geometry,
        minimum,
        scale,
        heart_centre(stored, geometry.spacing_mm),
        mean,
        std,
        float(stored.max()),
    )


def intensity_statistics(cine: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a (T, Z, H, W) cine, all-zero borders in space left out."""
    occupied = cine.any(axis=0)
    box = []
    for axis in range(3):
        line = np.flatnonzero(occupied.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(line[0], line[-1] + 1))
    inside = cine[(slice(None), *box)]
    return float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))


def heart_centre(cine: np.ndarray, spacing_mm: tuple[float, float]) -> tuple[float, float]:
    """Where the heart beats, found without labels: (row, column) in native pixels of a (T, Z, H, W) cine.

    The temporal standard deviation, blurred (sigma 4 mm), averaged over the slices and squared, times a
    Gaussian prior (sigma 50 mm) at the image centre; its centroid. The image centre where nothing moves or T
    is 1.
    """
    rows, columns = cine.shape[2:]
    middle = ((rows - 1) / 2, (columns - 1) / 2)
    motion = np.mean(
        [
            gaussian_filter(cine[:, z].std(axis=0, dtype=np.float32), [4 / s for s in spacing_mm])
            for z in range(cine.shape[1])
        ],
        axis=0,
        dtype=np.float64,
    )
    distance = [(np.arange(n) - m) * s for n, m, s in zip((rows, columns), middle, spacing_mm, strict=True)]
    prior = np.exp(-(distance[0][:, None] ** 2 + distance[1][None, :] ** 2) / (2 * 50.0**2))
    weight = motion**2 * prior
    if not weight.sum() > 0:
        return middle
    weight /= weight.sum()
    return float(weight.sum(axis=1) @ np.arange(rows)), float(weight.sum(axis=0) @ np.arange(columns))


def read_labels(subject: Subject, geometry: Geometry, shape: tuple[int, ...]) -> Labels:
    """Read the label files of a subject whose canonical cine has `shape` (T, Z, H, W). Raises BrokenSubject.

    A frame counts as labelled when anything in it is. ED is the labelled frame with the larger LV blood pool,
    ES the one with the smaller; what the data set's table says otherwise is reported, not believed.
    """
    masks: dict[int, np.ndarray] = {}
    for file in subject.labels:
        array = geometry.to_canonical(_read(file.path)[0])
        if array.shape[1:] != tuple(shape[1:]) or (file.frame is None and len(array) != shape[0]):
            raise BrokenSubject(
                f"{file.path}: expected the cine's shape (frames, slices, rows, columns) = "
                f"{tuple(shape)}, got {array.shape}"
            )
        ids = np.unique(array)
        if not np.isin(ids, np.arange(len(subject.label_ids))).all():
            raise BrokenSubject(
                f"{file.path}: expected label ids 0 to {len(subject.label_ids) - 1}, got {ids[:8].tolist()}"
            )
        array = np.array(subject.label_ids, np.uint8)[array.astype(np.uint8)]
        frames = range(shape[0]) if file.frame is None else [file.frame]
        if file.frame is not None and (not 0 <= file.frame < shape[0] or len(array) != 1):
            raise BrokenSubject(
                f"{file.path}: expected one of the cine's {shape[0]} frames, got frame "
                f"{file.frame} (counted from 0) with {len(array)} volumes"
            )
        masks.update({frame: mask for frame, mask in zip(frames, array, strict=True) if mask.any()})
    frames = tuple(sorted(masks))
    stacked = np.stack([masks[f] for f in frames]) if frames else np.zeros((0, *shape[1:]), np.uint8)
    ed, es, problems = _phases(subject, stacked, frames)
    return Labels(np.ascontiguousarray(stacked), frames, ed, es, problems)


def _phases(subject: Subject, masks: np.ndarray, frames: tuple[int, ...]):
    """(ED frame, ES frame, problems) from the LV blood pools of the labelled frames."""
    table = (subject.ed, subject.es)
    if not frames:
        return None, None, ()
    if len(frames) == 1:  # nothing to compare with: the table decides, ED where it says nothing
        return (None, frames[0], ()) if frames[0] == subject.es else (frames[0], None, ())
    pools = (masks == 1).sum(axis=(1, 2, 3))
    if pools.min() == pools.max():  # nothing to tell them apart by
        return (*table, ()) if set(table) <= set(frames) else (frames[0], frames[-1], ())
    found = (frames[int(pools.argmax())], frames[int(pools.argmin())])
    wrong = [
        f"{phase} is frame {f}, the table says {t} (both counted from 0)"
        for phase, f, t in zip(("ED", "ES"), found, table, strict=True)
        if t is not None and f != t
    ]
    return *found, tuple(wrong)
