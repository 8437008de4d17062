"""From a NIfTI file to a cine: read, made uniform, measured and judged."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from cmrssp.data import plausibility
from cmrssp.data.geometry import Geometry, from_header
from cmrssp.data.motion import motion_map, temporal_deviation
from cmrssp.data.nifti import cine_image, grid, time_step, voxels
from cmrssp.data.subject import CORRECTED, NOT_MEASURED, PLAIN, USED, BrokenSubject, Problem, Subject

_MAX_STORED = 32767
_FEW_VALUES = 4  # a label map has at most so many values beside 0
_MAX_NOT_FINITE = 0.01  # of the voxels


@dataclass(frozen=True)
class CineFacts:
    """What is known of a cine without its images. `stored = (raw - minimum) * scale`."""

    geometry: Geometry
    minimum: float
    scale: float  # 1 for whole numbers that fit int16
    centre: tuple[float, float]  # of the crop, (row, column) in native pixels
    mean: float
    std: float
    max: float
    time_step_s: float | None  # between frames
    heart_rate_per_min: float | None  # where the frames are one plausible beat
    sound_frames: tuple[int, ...]  # without a blank image, all if none is: ED and ES are looked for in these
    digest: str  # of the stored voxels: tells the same images under two names
    problems: tuple[Problem, ...]

    @property
    def measurable(self) -> bool:
        """False if volumes in ml would be wrong; then none is given."""
        return all(problem.done != NOT_MEASURED for problem in self.problems)


@dataclass(frozen=True)
class Cine(CineFacts):
    """One read cine."""

    stored: np.ndarray  # (T, Z, H, W) int16, not negative
    motion: np.ndarray  # (Z, H, W) float16, see `motion_map`


@np.errstate(all="ignore")
def read_cine(subject: Subject) -> Cine:
    """Read, make uniform, measure and judge one cine. Opens no label file. Raises BrokenSubject."""
    path, source = subject.cine, subject.source
    image = cine_image(subject)
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    unscaled = slope > 0 and math.isfinite(intercept)  # keeps whole numbers whole, and all proportions
    raw = voxels(path, image, scaled=not unscaled)
    affine, zooms, odd = grid(image)
    try:
        geometry, found = from_header(affine, zooms, raw.shape)
    except ValueError as error:
        raise BrokenSubject(f"{path}: {error}") from None
    odd += [*found, *(source.notes if source else ())]
    if (unsigned := plausibility.unwrapped(raw)) is not None:
        raw = unsigned
        odd.append(("values too large for the signed type were negative: read as unsigned", CORRECTED))
    if not np.isfinite([raw.min(), raw.max()]).all():
        finite = np.isfinite(raw)
        bad = raw.size - int(np.count_nonzero(finite))
        if bad > _MAX_NOT_FINITE * raw.size:
            raise BrokenSubject(f"{path}: NaN or infinity in {bad} of {raw.size} voxels")
        raw = np.where(finite, raw, raw[finite].min())
        odd.append((f"{bad} voxels are NaN or infinite: set to the minimum", CORRECTED))
    stored, minimum, scale = _stored(path, geometry.to_canonical(raw))
    mean, std = intensity_statistics(stored, max(0, round(-minimum * scale)))
    if not std > 0:
        raise BrokenSubject(f"{path}: expected an image, got a constant inside its borders")
    step_s, found = time_step(image)
    verdict, sound, rate = plausibility.judge(stored, geometry.spacing_mm, geometry.slice_pitch_mm, step_s)
    odd += [*found, *verdict]
    if len(stored) == 1 and subject.dataset != PLAIN:
        odd.append(("one frame where a cine has many: nothing moves, the crop is centred on the image", USED))
    if unscaled:
        minimum, scale = minimum * slope + intercept, scale / slope
    deviation = temporal_deviation(stored[sound])  # a blank frame is no motion
    return Cine(
        stored=stored,
        motion=motion_map(deviation, geometry.spacing_mm),
        geometry=geometry,
        minimum=minimum,
        scale=scale,
        centre=heart_centre(deviation, geometry.spacing_mm),
        mean=mean,
        std=std,
        max=float(stored.max()),
        time_step_s=step_s,
        heart_rate_per_min=(source and source.heart_rate_per_min) or rate,
        sound_frames=tuple(sound),
        digest=hashlib.sha256(stored.data).hexdigest(),
        problems=tuple(Problem(subject.key, path.name, what, done) for what, done in odd),
    )


def _stored(path: Path, array: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(T, Z, H, W) of any type -> (int16 from 0 on, minimum, factor). Raises BrokenSubject if no image."""
    minimum, maximum = float(array.min()), float(array.max())
    if all(frame.min() == frame.max() for frame in array):
        raise BrokenSubject(f"{path}: expected an image, got a constant in every frame, {minimum:g} first")
    if maximum - minimum <= _FEW_VALUES and len(found := np.unique(array)) <= _FEW_VALUES + 1:
        values = ", ".join(f"{v:g}" for v in found)
        raise BrokenSubject(
            f"{path}: expected an image, got the values {values} alone: a label map? Give the end of label "
            "files' names as --label-suffix, or keep them in another folder"
        )
    whole = array.dtype.kind in "iu" or all((frame == np.round(frame)).all() for frame in array)
    scale = 1.0 if whole and maximum - minimum <= _MAX_STORED else _MAX_STORED / (maximum - minimum)
    stored = np.empty(array.shape, np.int16)  # filled a frame at a time, to save memory
    for frame, out in zip(array, stored, strict=True):
        out[...] = np.round((frame.astype(np.float64) - minimum) * scale)
    return stored, minimum, scale


def intensity_statistics(cine: np.ndarray, zero: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of a cine (T, Z, H, W) inside its borders of `zero`, the stored 0."""
    occupied = (cine != zero).any(axis=0)
    lines = [np.flatnonzero(occupied.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    inside = cine[(slice(None), *(slice(line[0], line[-1] + 1) for line in lines))]
    mean = float(inside.mean(dtype=np.float64))
    square = np.mean([np.square(frame - np.float32(mean)).mean(dtype=np.float64) for frame in inside])
    return mean, math.sqrt(square)


def heart_centre(deviation: np.ndarray, spacing_mm: tuple[float, float]) -> tuple[float, float]:
    """Where the heart beats, found without labels: (row, column) in native pixels.

    The centroid of a cine's temporal deviation (Z, H, W), averaged over the slices, blurred (sigma 4 mm),
    squared, weighted with a Gaussian (sigma 50 mm) around the image's centre (returned if nothing moves).
    """
    rows, columns = deviation.shape[1:]
    middle = ((rows - 1) / 2, (columns - 1) / 2)
    motion = gaussian_filter(deviation.mean(axis=0).astype(np.float64), [4 / s for s in spacing_mm])
    v, u = ((np.arange(n) - m) * s for n, m, s in zip((rows, columns), middle, spacing_mm, strict=True))
    weight = motion**2 * np.exp(-(v[:, None] ** 2 + u**2) / (2 * 50.0**2))
    if not weight.sum() > 0:
        return middle
    weight /= weight.sum()
    return float(weight.sum(axis=1) @ np.arange(rows)), float(weight.sum(axis=0) @ np.arange(columns))
