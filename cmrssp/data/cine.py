"""From a NIfTI file to a cine: read, made uniform, measured, and checked."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from cmrssp.data.geometry import Geometry, believe
from cmrssp.data.nifti import affine_of, load, time_step, voxels
from cmrssp.data.subject import CORRECTED, PLAIN, USED, BrokenSubject, Problem, Subject

_MAX_STORED = 32767
_FEW_VALUES = 4  # a label map has at most so many values beside 0
_MIN_LEVELS = 32  # that 98 % of the voxels must span
_MAX_NOT_FINITE = 0.01  # of the voxels


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
    time_step_s: float | None  # between frames, where the file says it
    digest: str  # of `stored`: the same image under two names is found by it
    problems: tuple[Problem, ...] = ()


@np.errstate(all="ignore")
def read_cine(subject: Subject) -> Cine:
    """Read, make uniform and measure one cine. Raises BrokenSubject. Opens no label file."""
    path = subject.cine
    image = load(path)
    slope, intercept = (float(v) for v in (image.dataobj.slope, image.dataobj.inter))
    # a positive slope changes no proportions, and whole numbers stay whole
    keep = slope > 0 and math.isfinite(intercept)
    raw = voxels(path, image, scaled=not keep)
    try:
        geometry, odd = believe(affine_of(image), image.header.get_zooms()[:3])
    except ValueError as error:
        raise BrokenSubject(f"{path}: {error}") from None
    raw, lowest, highest, repaired = _finite(path, raw)
    minimum, maximum = float(lowest.min()), float(highest.max())
    if minimum == maximum:
        raise BrokenSubject(f"{path}: expected an image, got the constant {minimum:g} everywhere")
    if maximum - minimum <= _FEW_VALUES and len(found := np.unique(raw)) <= _FEW_VALUES + 1:
        raise BrokenSubject(
            f"{path}: expected an image, got the values {', '.join(f'{v:g}' for v in found)} alone: a label "
            "map? Give the end of label files' names as --label-suffix, or keep them in another folder"
        )
    stored, scale = _stored(geometry.to_canonical(raw), minimum, maximum)
    constant = np.flatnonzero(lowest == highest).tolist()
    if len(constant) == len(stored):
        raise BrokenSubject(f"{path}: expected images, got a constant in each of the {len(stored)} frames")
    if constant:
        odd.append((f"constant frames: {_some(constant)} of {len(stored)}, counted from 0", USED))
    odd += [(repaired, CORRECTED)] if repaired else []
    if len(stored) == 1 and subject.dataset != PLAIN:
        odd.append(("one frame where a cine has many: nothing moves, its crop centre is the image's", USED))
    if scale != 1:  # not every value has kept a level of its own
        levels = float(np.ptp(np.percentile(stored[:, :, ::2, ::2], (1, 99))))
        if levels < _MIN_LEVELS:
            raise BrokenSubject(
                f"{path}: expected an image, got a few voxels so far from all others (from {minimum:g} to "
                f"{maximum:g}) that int16 leaves {levels:.0f} grey levels to 98 % of them"
            )
    mean, std = intensity_statistics(stored, max(0, round(-minimum * scale)))
    if not std > 0:
        raise BrokenSubject(f"{path}: expected an image, got a constant inside its borders")
    if keep:
        minimum, scale = minimum * slope + intercept, scale / slope
    return Cine(
        stored=stored,
        geometry=geometry,
        minimum=minimum,
        scale=scale,
        centre=heart_centre(stored, geometry.spacing_mm),
        mean=mean,
        std=std,
        max=float(stored.max()),
        time_step_s=time_step(image),
        digest=hashlib.sha256(stored.data).hexdigest(),
        problems=tuple(Problem(subject.key, path.name, what, done) for what, done in odd),
    )


def _finite(path: Path, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """(voxels, minimum of each frame, maximum of each, what was repaired): a few voxels that are no number
    become the minimum of all.
    """
    lowest, highest = _extremes(raw)
    if np.isfinite([lowest, highest]).all():  # NaN and infinity would show
        return raw, lowest, highest, ""
    finite = np.isfinite(raw)
    bad = raw.size - int(np.count_nonzero(finite))
    if bad > _MAX_NOT_FINITE * raw.size:
        raise BrokenSubject(
            f"{path}: expected finite intensities, got NaN or infinity in {bad} of {raw.size} voxels"
        )
    raw = np.where(finite, raw, raw[finite].min())
    return raw, *_extremes(raw), f"{bad} voxels are NaN or infinite: set to the minimum"


def _extremes(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum of each frame, (T,) each."""
    frames = [raw[..., t] for t in range(raw.shape[3])]
    return np.array([frame.min() for frame in frames]), np.array([frame.max() for frame in frames])


def _stored(array: np.ndarray, minimum: float, maximum: float) -> tuple[np.ndarray, float]:
    """(T, Z, H, W) of any type as contiguous int16 from 0 on, and the factor; a frame at a time, to save
    memory.
    """
    whole = array.dtype.kind in "iu" or all((frame == np.round(frame)).all() for frame in array)
    stored = np.empty(array.shape, np.int16)
    if whole and maximum - minimum <= _MAX_STORED:
        kind = np.promote_types(array.dtype, np.int16)  # may wrap on the way: the difference fits
        for frame, out in zip(array, stored, strict=True):
            np.subtract(frame, kind.type(minimum), out=out, dtype=kind, casting="unsafe")
        return stored, 1.0
    scale = _MAX_STORED / (maximum - minimum)
    for frame, out in zip(array, stored, strict=True):
        out[...] = np.round((frame.astype(np.float64) - minimum) * scale)
    return stored, scale


def _some(numbers: Sequence[int], limit: int = 8) -> str:
    return ", ".join(map(str, numbers[:limit])) + (", ..." if len(numbers) > limit else "")


def intensity_statistics(cine: np.ndarray, zero: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of a (T, Z, H, W) cine; borders in space that hold nothing but `zero`, as
    the file's 0 is stored, are left out.
    """
    occupied = (cine != zero).any(axis=0)
    box = []
    for axis in range(3):
        line = np.flatnonzero(occupied.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(line[0], line[-1] + 1))
    inside = cine[(slice(None), *box)]
    mean = float(inside.mean(dtype=np.float64))
    square = np.mean([np.square(frame - np.float32(mean)).mean(dtype=np.float64) for frame in inside])
    return mean, math.sqrt(square)


def heart_centre(cine: np.ndarray, spacing_mm: tuple[float, float]) -> tuple[float, float]:
    """Where the heart beats, found without labels: (row, column) in native pixels of a (T, Z, H, W) cine.

    The temporal standard deviation, averaged over the slices, blurred (sigma 4 mm) and squared, times a
    Gaussian prior (sigma 50 mm) at the image centre; its centroid. The image centre where nothing moves or T
    is 1.
    """
    rows, columns = cine.shape[2:]
    middle = ((rows - 1) / 2, (columns - 1) / 2)
    moving = np.mean([cine[:, z].std(axis=0, dtype=np.float32) for z in range(cine.shape[1])], axis=0)
    motion = gaussian_filter(moving.astype(np.float64), [4 / s for s in spacing_mm])
    distance = [(np.arange(n) - m) * s for n, m, s in zip((rows, columns), middle, spacing_mm, strict=True)]
    prior = np.exp(-(distance[0][:, None] ** 2 + distance[1][None, :] ** 2) / (2 * 50.0**2))
    weight = motion**2 * prior
    if not weight.sum() > 0:
        return middle
    weight /= weight.sum()
    return float(weight.sum(axis=1) @ np.arange(rows)), float(weight.sum(axis=0) @ np.arange(columns))
