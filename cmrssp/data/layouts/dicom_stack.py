"""From the images of a DICOM study to one short-axis cine: which images, in which order, on which grid."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pydicom

from cmrssp.data.layouts.dicom_header import Image
from cmrssp.data.subject import CORRECTED, NOT_MEASURED, USED, BrokenSubject

MIN_FRAMES, MIN_SLICES = 8, 3  # of a short-axis cine
_SAME_MM = 1.0  # positions that are nearer are the same slice
_PARALLEL = np.cos(np.deg2rad(1.0))
_COMPLETE = 0.8  # of the largest number of slices
_APEX = np.array([1.0, -1.0, -1.0]) / np.sqrt(3)  # in DICOM's LPS: left, front, feet
_SHORT_AXIS = 0.7  # cosine between the apex direction and the normal; 0.58 for planes along the body's axes
_BEAT_MS, _CYCLE_MS = 250.0, 200.0  # least time between two heartbeats; least length of a cycle
Note = tuple[str, str]  # what, and what was done


class Scan(NamedTuple):
    """One pass over the cycle at one position: images in the order of time."""

    images: list[Image]
    at: float  # mm along the normal

    @property
    def order(self) -> tuple:
        return max(image.order for image in self.images)


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
        self.slope, self.inter = scales.pop() if len(scales) == 1 else (1.0, 0.0)
        self.scaled = bool(scales)  # image by image

    def get_unscaled(self) -> np.ndarray:
        """Raises BrokenSubject, without a word of what the files say."""
        places = defaultdict(list)
        for z, line in enumerate(self.grid):
            for t, image in enumerate(line):
                places[image.path].append((image, t, z))
        voxels = None
        for path, wanted in places.items():
            try:
                pixels = pydicom.dcmread(path, force=True).pixel_array.reshape(-1, *self.shape[1::-1])
                planes = [pixels[image.index] for image, *_ in wanted]
            except Exception:  # the decoders raise all kinds
                numbers = {image.number for image, *_ in wanted}
                raise BrokenSubject(
                    f"series {_some(numbers)}: the pixels of a file cannot be read (truncated? damaged?): "
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


def assemble(images: Iterable[Image]) -> tuple[Stack | None, list[tuple[str, str]]]:
    """The short-axis cine of a study, None without one; and what was left out as (series, reason)."""
    left: dict[str, list[Image]] = defaultdict(list)
    stacks: list[tuple[list[Scan], np.ndarray]] = []
    readable: dict[str, str] = {}
    usable = []
    for image in images:
        if not image.reason and image.syntax not in readable:
            readable[image.syntax] = _unreadable(image.syntax)
        why = image.reason or readable[image.syntax]
        (left[why] if why else usable).append(image)
    for group in _grids(usable):
        normal = group[0].normal
        scans = []
        for scan in _scans(group, normal):
            if why := _no_cine(scan.images):
                left[why] += scan.images
            else:
                scans.append(scan)
        stacks += [(stack, normal) for stack in _stacks(scans)]
    chosen, normal = _choose(stacks)
    for stack, other in stacks:
        if stack is not chosen:
            left[_why_not(stack, other, chosen, normal)] += [image for scan in stack for image in scan.images]
    listed = [(f"series {_some({i.number for i in group})}", f"{why} ({len(group)} images)")
              for why, group in sorted(left.items())]  # fmt: skip
    return (_finish(chosen) if chosen else None), listed


def _unreadable(syntax: str) -> str:
    """Why pixels in a transfer syntax cannot be read; "" where they can."""
    try:
        uid = pydicom.uid.UID(syntax)
        if not uid.is_compressed or pydicom.pixels.get_decoder(uid).is_available:
            return ""
    except (ValueError, NotImplementedError):
        return "unknown compression of the pixels"
    return (f"compressed as {uid.name}, which needs plug-ins: pip install pylibjpeg pylibjpeg-libjpeg "
            "pylibjpeg-openjpeg")  # fmt: skip


def _grids(images: Sequence[Image]) -> list[list[Image]]:
    """Images with the same pixel grid and parallel planes; the last digits of the header do not count."""
    exact = defaultdict(list)
    for image in images:
        exact[image.grid, image.axes].append(image)
    groups: list[list[Image]] = []
    for members in sorted(exact.values(), key=len, reverse=True):
        for group in groups:
            ours, theirs = np.array(group[0].axes).reshape(2, 3), np.array(members[0].axes).reshape(2, 3)
            same_grid = np.allclose(group[0].grid, members[0].grid, rtol=1e-3)
            if same_grid and ((ours * theirs).sum(axis=1) >= _PARALLEL).all():
                group += members
                break
        else:
            groups.append(list(members))
    return groups


def _scans(group: Sequence[Image], normal: np.ndarray) -> list[Scan]:
    at = np.array([np.dot(image.position, normal) for image in group])
    slices = _levels(at)
    parts = defaultdict(list)
    for image, z in zip(group, slices, strict=True):
        parts[image.series, int(z)].append(image)
    scans = []
    for (_, z), members in parts.items():
        by_number = defaultdict(list)
        for image in members:
            by_number[image.acquisition].append(image)
        several = min(map(len, by_number.values())) >= MIN_FRAMES
        for part in by_number.values() if several else [members]:
            scans += [Scan(images, float(at[slices == z].mean())) for images in _passes(part)]
    return scans


def _levels(at: np.ndarray) -> np.ndarray:
    """The number of the slice that each position (mm along the normal) belongs to."""
    order = np.argsort(at)
    found = np.zeros(len(at), int)
    found[order[1:]] = np.cumsum(np.diff(at[order]) > _SAME_MM)
    return found


def _passes(images: Sequence[Image]) -> list[list[Image]]:
    """Images of one position, in the order of time, apart where the slice was scanned twice."""
    images = sorted(images, key=lambda image: image.order)
    times = _times(images)
    cuts = [k for k in range(1, len(times)) if times[k] <= times[k - 1]]
    runs = [range(a, b) for a, b in pairwise([0, *cuts, len(images)])]
    again = all(times[b[0]] < times[a[-1]] and times[a[0]] < times[b[-1]] for a, b in pairwise(runs))
    if again and min(map(len, runs)) >= MIN_FRAMES:
        return [[images[k] for k in run] for run in runs]
    latest = dict(zip(times, images, strict=True))  # of two with the same time the later one
    return [[latest[time] for time in sorted(latest)]]


def _times(images: Sequence[Image]) -> list[float]:
    """By trigger time, else by temporal position, else by instance number, else as acquired."""
    for values in (
        [image.trigger_ms for image in images],
        [image.temporal for image in images],
        [float(image.instance) for image in images],
    ):
        if None not in values and len(set(values)) > len(values) / 4:
            return values
    return [float(k) for k in range(len(images))]


def _no_cine(images: Sequence[Image]) -> str:
    """Why the images of one position are no cine; "" for a cine."""
    if len(images) < MIN_FRAMES:
        return f"fewer than {MIN_FRAMES} frames at a position"
    if len({image.inversion_ms for image in images}) > 2:
        return "inversion times differ within a position: a mapping sequence"
    triggers = np.array([image.trigger_ms for image in images], float)
    if np.isfinite(triggers).all() and np.ptp(triggers) >= _CYCLE_MS:
        steps = np.diff(triggers)
    else:
        steps = np.diff(sorted(image.clock_ms for image in images))
    if np.median(steps) >= _BEAT_MS:
        return "each frame is of another heartbeat: perfusion or mapping"
    return ""


def _stacks(scans: Sequence[Scan]) -> list[list[Scan]]:
    """Scans on one grid as stacks. A series of three positions or more is a stack, or half of one; a series
    of fewer belongs to the stack before it, or, where there is none, is a part of one.
    """
    series = defaultdict(list)
    for scan in scans:
        series[scan.images[0].series].append(scan)
    parts = sorted(series.values(), key=lambda part: (-_depth(part), min(scan.order for scan in part)))
    stacks: list[list[Scan]] = []
    for part in (part for part in parts if _depth(part) >= MIN_SLICES):
        for stack in stacks:
            joined = _depth(stack + part)
            again = joined == _depth(stack) and _depth(part) < _COMPLETE * joined
            if again or (joined == _depth(stack) + _depth(part) and _regular(stack + part)):
                stack += part
                break
        else:
            stacks.append(part)
    single = [part for part in parts if _depth(part) < MIN_SLICES]
    if not stacks:
        return [[scan for part in single for scan in part]] if single else []
    for part in single:
        fits = [s for s in stacks if _depth(s + part) == _depth(s) or _regular(s + part)]
        before = [s for s in fits if min(scan.order for scan in s) <= min(scan.order for scan in part)]
        home = max(before or fits or [[]], key=lambda s: min((scan.order for scan in s), default=()))
        home += part
        if not fits:
            stacks.append(part)
    return stacks


def _depth(scans: Sequence[Scan]) -> int:
    return int(_levels(np.array([scan.at for scan in scans])).max()) + 1


def _regular(scans: Sequence[Scan]) -> bool:
    at = np.array([scan.at for scan in scans])
    gaps = np.diff([at[_levels(at) == z].mean() for z in range(_depth(scans))])
    return bool(gaps.max() < 1.5 * np.median(gaps) and gaps.min() > 0.5 * np.median(gaps))


def _choose(stacks: Sequence[tuple[list[Scan], np.ndarray]]) -> tuple[list[Scan] | None, np.ndarray | None]:
    """The stack to use: short-axis before others, complete before others, then the latest."""
    enough = [s for s in stacks if _depth(s[0]) >= MIN_SLICES]
    if not enough:
        return None, None
    enough = [s for s in enough if abs(s[1] @ _APEX) >= _SHORT_AXIS] or enough
    most = max(_depth(stack) for stack, _ in enough)
    complete = [s for s in enough if _depth(s[0]) >= _COMPLETE * most]
    return max(complete, key=lambda s: max(scan.order for scan in s[0]))


def _why_not(stack: list[Scan], normal: np.ndarray, chosen: list[Scan] | None, of_chosen) -> str:
    if chosen is None or _depth(stack) < MIN_SLICES:
        angle = np.rad2deg(np.arccos(np.clip(abs(normal @ of_chosen), 0, 1))) if chosen else 90.0
        if angle < 30:
            tilted = f"not parallel to the stack ({angle:.1f} degrees)"
            return tilted if angle > 1 else "another pixel grid than the stack"
        return f"fewer than {MIN_SLICES} parallel positions: a long-axis cine"
    if abs(normal @ _APEX) < _SHORT_AXIS <= abs(of_chosen @ _APEX):
        return "the planes are not those of a short axis"
    complete = _depth(stack) >= _COMPLETE * _depth(chosen)
    return "another complete stack: the later one is used" if complete else "fewer slices than another stack"


def _finish(scans: list[Scan]) -> Stack:
    """One scan a slice, one number of frames, the affine and the time step."""
    notes: list[Note] = []
    levels = _levels(np.array([scan.at for scan in scans]))
    lines = [max((s for s, z in zip(scans, levels, strict=True) if z == level), key=lambda s: s.order)
             for level in range(levels.max() + 1)]  # fmt: skip
    if again := [z for z, n in sorted(Counter(levels.tolist()).items()) if n > 1]:
        notes.append((f"scanned again, the later scan is used: slice {_some(again)} (counted from 0)", USED))
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
            missing = f"; frame {_some(lost)} is missing, a neighbour stands in" if len(lost) else ""
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
        if np.isfinite(times).all() and np.ptp(times) >= _CYCLE_MS:
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
    elif off > _SAME_MM:
        notes.append((f"the slices are up to {off:.1f} mm off an even stack", USED))
    return affine, notes


def _some(numbers: Iterable[int], limit: int = 8) -> str:
    numbers = sorted(numbers)
    shown = ", ".join("without number" if n < 0 else str(n) for n in numbers[:limit])
    return shown + (", ..." if len(numbers) > limit else "")
