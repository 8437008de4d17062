"""One short-axis cine from the scans of a DICOM study: its grid, time, affine and voxels."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom

from cmrssp.data.layouts.dicom_header import Image
from cmrssp.data.layouts.dicom_series import CYCLE_MS, SAME_MM, Scan, levels, some
from cmrssp.data.subject import CORRECTED, NOT_MEASURED, USED, BrokenSubject

Note = tuple[str, str]  # what is odd, what was done


@dataclass(frozen=True, eq=False)
class Stack:
    """A cine whose voxels lie in DICOM files; the axes and the affine are those that dcm2niix gives."""

    grid: list[list[Image]]  # slices, frames
    affine: np.ndarray  # 4x4, RAS+
    step_s: float | None
    heart_rate_per_min: float | None
    notes: tuple[Note, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({image.path for line in self.grid for image in line}))

    def image(self) -> nibabel.Nifti1Image:
        """As if it were read from a NIfTI file; the voxels are read when they are asked for."""
        nifti = nibabel.Nifti1Image(_Voxels(self.grid), self.affine, nibabel.Nifti1Header())
        nifti.set_sform(self.affine, "scanner")
        nifti.set_qform(self.affine, "scanner")
        nifti.header.set_zooms((*np.linalg.norm(self.affine[:3, :3], axis=0), self.step_s or 0.0))
        nifti.header.set_xyzt_units("mm", "sec")
        return nifti


class _Voxels:
    """What nibabel takes for the voxels of a file: (columns, rows, slices, frames), rows reversed."""

    is_proxy, ndim, dtype = True, 4, np.dtype(np.int16)

    def __init__(self, grid: list[list[Image]]) -> None:
        self.grid, first = grid, grid[0][0]
        self.shape = (int(first.grid[1]), int(first.grid[0]), len(grid), len(grid[0]))
        scales = {(image.slope, image.intercept) for line in grid for image in line}
        self.scaled = len(scales) > 1  # then each image by its own slope and intercept
        self.slope, self.inter = (1.0, 0.0) if self.scaled else scales.pop()

    def get_unscaled(self) -> np.ndarray:
        """Raises BrokenSubject, without a word of what the files say."""
        places = defaultdict(list)
        for z, line in enumerate(self.grid):
            for t, image in enumerate(line):
                places[image.path].append((image, t, z))
        voxels = None
        for path, wanted in places.items():
            try:
                pixels = pydicom.pixels.pixel_array(path, raw=True).reshape(-1, *self.shape[1::-1])
                planes = [pixels[image.index] for image, *_ in wanted]
            except Exception:  # the decoders raise all kinds
                numbers = {image.number for image, *_ in wanted}
                raise BrokenSubject(
                    f"series {some(numbers)}: the pixels of a file cannot be read (truncated? damaged?): "
                    f"{wanted[0][0].place}"
                ) from None
            for plane, (image, t, z) in zip(planes, wanted, strict=True):
                if self.scaled:
                    plane = np.float32(plane * image.slope + image.intercept)
                if voxels is None:
                    voxels = np.zeros(self.shape[::-1], plane.dtype)
                elif voxels.dtype != plane.dtype:
                    voxels = voxels.astype(np.promote_types(voxels.dtype, plane.dtype))
                voxels[t, z] = plane[::-1]
        return voxels.T

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.get_unscaled() * self.slope + self.inter, dtype)


def assemble(scans: Sequence[Scan]) -> Stack:
    """The stack of some scans: one a slice, the later one, with one number of frames."""
    notes: list[Note] = []
    slices = defaultdict(list)
    for scan, z in zip(scans, levels(scans).tolist(), strict=True):
        slices[z].append(scan)
    lines = [max(slices[z], key=lambda scan: scan.order) for z in sorted(slices)]
    if again := [z for z, found in slices.items() if len(found) > 1]:
        notes.append((f"scanned again, the later scan is used: slice {some(again)} (counted from 0)", USED))
    counts = Counter(len(line.images) for line in lines)
    frames = max(counts, key=lambda n: (counts[n], n))
    usual = [line.images for line in lines if len(line.images) == frames]
    target = np.median([_phases(images) for images in usual], axis=0)
    grid = []
    for z, line in enumerate(lines):
        images = line.images
        if len(images) != frames:
            distance = np.abs(_phases(images)[:, None] - target).round(6)
            lost = np.flatnonzero(distance.min(axis=0) > 0.75 / frames)
            missing = f"; frame {some(lost)} is missing, a neighbour stands in" if len(lost) else ""
            notes.append((f"slice {z} has {len(images)} frames, most have {frames}: brought to {frames} by "
                          f"nearest phase{missing} (counted from 0)", CORRECTED))  # fmt: skip
            images = [images[k] for k in distance.argmin(axis=0)]
        grid.append(images)
    step_s, rate, odd = _timing(usual)
    affine, off = _affine(grid)
    return Stack(grid, affine, step_s, rate, (*notes, *odd, *off))


def _phases(images: Sequence[Image]) -> np.ndarray:
    """When in the cycle each frame is, from 0 to 1; evenly spread where the header does not say it."""
    times = np.array([image.trigger_ms for image in images], float)
    rr = images[0].rr_ms or (times[-1] - times[0]) * len(times) / (len(times) - 1)
    return times / rr if np.isfinite(times).all() and rr > 0 else np.arange(len(images)) / len(images)


def _timing(lines: Sequence[Sequence[Image]]) -> tuple[float | None, float | None, list[Note]]:
    """(seconds between frames, heart rate per minute, notes): medians over the slices."""
    steps, gaps = [], []
    for images in lines:
        times = np.array([image.trigger_ms for image in images], float)
        if np.isfinite(times).all() and np.ptp(times) >= CYCLE_MS:
            steps.append((times[-1] - times[0]) / (len(times) - 1))
            gaps.append(np.diff(times).max() / np.median(np.diff(times)))
        elif images[0].rr_ms:
            steps.append(images[0].rr_ms / len(images))
    rr = [images[0].rr_ms for images in lines if images[0].rr_ms]
    rr = rr or [step * len(images) for step, images in zip(steps, lines, strict=False)]
    lacking = max(gaps, default=0)
    return (
        float(np.median(steps)) / 1000 if steps else None,
        60000 / float(np.median(rr)) if rr else None,
        [(f"a frame seems to be missing: one step in time is {lacking:.1f} times the others", USED)]
        if lacking > 1.7
        else [],
    )


def _affine(grid: list[list[Image]]) -> tuple[np.ndarray, list[Note]]:
    """4x4 RAS+ of (column, reversed row, slice), and notes on slices that are not where it puts them."""
    notes: list[Note] = []
    at, numbers = np.array([line[0].position for line in grid]), np.arange(len(grid))[:, None]
    # dcm2niix begins at the first image and takes the distance to the next slice: for the last digits
    one, two = sorted(range(len(grid)), key=lambda z: min(image.instance for image in grid[z]))[:2]
    image = grid[one][0]
    step = image.normal * np.linalg.norm(at[two] - at[one])
    origin = at[one] - one * step
    if np.abs(origin + numbers * step - at).max() > 0.05:
        origin, step = at[0], (at[-1] - at[0]) / (len(at) - 1)
    rows, _, between_rows, between_columns = image.grid
    along_row, along_column = np.array(image.axes).reshape(2, 3)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_row * between_columns, -along_column * between_rows
    affine[:3, 2], affine[:3, 3] = step, origin + along_column * between_rows * (rows - 1)
    affine[:2] *= -1  # LPS to RAS
    gaps, off = np.diff(at @ image.normal), np.linalg.norm(origin + numbers * step - at, axis=1).max()
    if gaps.max() > 1.5 * np.median(gaps):
        notes.append((f"a slice seems to be missing: they are {gaps.min():.1f} to {gaps.max():.1f} mm apart; "
                      "their mean distance is used", NOT_MEASURED))  # fmt: skip
    elif off > SAME_MM:
        notes.append((f"the slices are up to {off:.1f} mm off an even stack", USED))
    return affine, notes
