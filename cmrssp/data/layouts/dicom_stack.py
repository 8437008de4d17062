"""One short-axis cine from the scans of a DICOM study: its grid, time, affine and voxels."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
import pydicom

from cmrssp.data.layouts.dicom_header import Image
from cmrssp.data.layouts.dicom_series import CYCLE_MS, Scan, levels, numbers
from cmrssp.data.subject import CORRECTED, NOT_MEASURED, USED, BrokenSubject, Finding, listed


@dataclass(frozen=True, eq=False)
class Stack:
    """A cine whose voxels lie in DICOM files; the axes and the affine are those that dcm2niix gives."""

    grid: list[list[Image]]  # slices, frames
    affine: np.ndarray  # 4x4, RAS+
    step_s: float | None
    heart_rate_per_min: float | None
    notes: tuple[Finding, ...]

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
        read = lru_cache(1)(pydicom.pixels.pixel_array)  # of all frames of a file
        planes = []
        for image in (image for line in self.grid for image in line):
            try:
                plane = read(image.path, raw=True).reshape(-1, *self.shape[1::-1])[image.index]
            except Exception:  # the decoders raise all kinds
                raise BrokenSubject(
                    f"series {numbers([image])}: the pixels of {image.place} cannot be read; damaged, or "
                    "compressed? then pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
                ) from None
            plane = np.float32(plane * image.slope + image.intercept) if self.scaled else plane
            planes.append(plane[::-1])
        return np.stack(planes).reshape(*self.shape[2:], *self.shape[1::-1]).transpose(3, 2, 0, 1)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.get_unscaled() * self.slope + self.inter, dtype)


def assemble(scans: Sequence[Scan]) -> Stack:
    """The stack of some scans: the latest of each slice, all with one number of frames."""
    notes: list[Finding] = []
    slices = defaultdict(list)
    for scan, z in zip(scans, levels(scans).tolist(), strict=True):
        slices[z].append(scan)
    lines = [max(slices[z], key=lambda scan: scan.order).images for z in sorted(slices)]
    if again := [z for z in sorted(slices) if len(slices[z]) > 1]:
        notes.append((f"scanned again, the later scan is used: slice {listed(again)}, from 0", USED))
    counts = Counter(map(len, lines))
    frames = max(counts, key=lambda n: (counts[n], n))
    usual = [images for images in lines if len(images) == frames]
    target = np.median([_phases(images) for images in usual], axis=0)
    for z, images in enumerate(lines):
        if len(images) != frames:
            nearest = np.abs(_phases(images)[:, None] - target).round(6).argmin(axis=0)
            lines[z] = [images[k] for k in nearest]
            what = (
                f"slice {z} (from 0) has {len(images)} frames, most have {frames}: brought to these by phase"
            )
            notes.append((what, CORRECTED))
    affine, off = _affine(lines)
    return Stack(lines, affine, *_timing(usual), (*notes, *off))


def _phases(images: Sequence[Image]) -> np.ndarray:
    """When in the cycle each frame is, from 0 to 1; evenly spread where the header does not say it."""
    times = np.array([image.trigger_ms for image in images], float)
    rr = images[0].rr_ms or (times[-1] - times[0]) * len(times) / (len(times) - 1)
    return times / rr if np.isfinite(times).all() and rr > 0 else np.arange(len(images)) / len(images)


def _timing(lines: Sequence[Sequence[Image]]) -> tuple[float | None, float | None]:
    """(seconds between frames, heart rate per minute): medians over the slices."""
    steps = []
    for images in lines:
        times = np.array([image.trigger_ms for image in images], float)
        if np.ptp(times) >= CYCLE_MS:  # not where one is NaN
            steps.append((times[-1] - times[0]) / (len(times) - 1))
        elif images[0].rr_ms:
            steps.append(images[0].rr_ms / len(images))
    rr = [images[0].rr_ms for images in lines if images[0].rr_ms] or [step * len(lines[0]) for step in steps]
    return float(np.median(steps)) / 1000 if steps else None, 60000 / float(np.median(rr)) if rr else None


def _affine(grid: list[list[Image]]) -> tuple[np.ndarray, list[Finding]]:
    """4x4 RAS+ of (column, reversed row, slice), and notes on slices that are not where it puts them."""
    image, at = grid[0][0], np.array([line[0].position for line in grid])
    step = (at[-1] - at[0]) / (len(at) - 1)
    rows, _, between_rows, between_columns = image.grid
    along_row, along_column = np.array(image.axes).reshape(2, 3)
    corner = at[0] + along_column * between_rows * (rows - 1)
    columns = np.stack([along_row * between_columns, -along_column * between_rows, step], axis=1)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nibabel.affines.from_matvec(columns, corner)  # LPS to RAS
    gaps = np.diff(at @ image.normal)
    if gaps.max() <= 1.5 * np.median(gaps):
        return affine, []
    what = f"a slice seems to be missing: they are {gaps.min():.1f} to {gaps.max():.1f} mm apart"
    return affine, [(what + "; their mean distance is used", NOT_MEASURED)]
