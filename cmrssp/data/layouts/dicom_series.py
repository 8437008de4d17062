"""Which series of a DICOM study are its short-axis cine: by geometry and time, not by description."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pydicom

from cmrssp.data.layouts.dicom_header import Image

MIN_FRAMES, MIN_SLICES = 8, 3  # of a short-axis cine
SAME_MM = 1.0  # positions that are nearer are the same slice
CYCLE_MS = 200.0  # trigger times of a cine span more
_BEAT_MS = 250.0  # frames of different heartbeats are further apart
_PARALLEL = np.cos(np.deg2rad(1.0))
_COMPLETE = 0.8  # of the largest number of slices
_APEX = np.array([1.0, -1.0, -1.0]) / np.sqrt(3)  # left, front, feet in DICOM's axes
_SHORT_AXIS = 0.7  # cosine between the normal and the apex direction; 0.58 for planes along the body's axes


class Scan(NamedTuple):
    """One pass over the cycle at one position: images in the order of time."""

    images: list[Image]
    at: float  # mm along the normal

    @property
    def order(self) -> tuple:
        return max(image.order for image in self.images)


def choose(images: Iterable[Image]) -> tuple[list[Scan], list[tuple[str, str]]]:
    """The scans of the short-axis cine of a study, none where it has no such cine; and what was left out, as
    (series, reason).
    """
    left: dict[str, list[Image]] = defaultdict(list)
    readable: dict[str, str] = {}
    usable = []
    for image in images:
        if image.syntax not in readable:
            readable[image.syntax] = _unreadable(image.syntax)
        why = image.reason or readable[image.syntax]
        (left[why] if why else usable).append(image)
    stacks = []
    for group in _grids(usable):
        cines = []
        for scan in _scans(group):
            if why := _no_cine(scan.images):
                left[why] += scan.images
            else:
                cines.append(scan)
        stacks += _stacks(cines)
    chosen = _best(stacks)
    for stack in stacks:
        if stack is not chosen:
            left[_why_not(stack, chosen)] += [image for scan in stack for image in scan.images]
    return chosen, [
        (f"series {some(i.number for i in group)}", f"{why} ({len(group)} image{'s' * (len(group) > 1)})")
        for why, group in sorted(left.items())
    ]


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
            ours, theirs = group[0], members[0]
            turned = np.sum(np.multiply(ours.axes, theirs.axes).reshape(2, 3), axis=1) < _PARALLEL
            same_grid = ours.grid[:2] == theirs.grid[:2] and np.allclose(ours.grid, theirs.grid, rtol=1e-3)
            if same_grid and not turned.any():
                group += members
                break
        else:
            groups.append(list(members))
    return groups


def _scans(group: Sequence[Image]) -> list[Scan]:
    at = np.array([image.position for image in group]) @ group[0].normal
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
    if np.isfinite(triggers).all() and np.ptp(triggers) >= CYCLE_MS:
        steps = np.diff(triggers)
    else:
        steps = np.diff(sorted(image.clock_ms for image in images))
    if np.median(steps) >= _BEAT_MS:
        return "each frame is of another heartbeat: perfusion or mapping"
    return ""


def _stacks(scans: Sequence[Scan]) -> list[list[Scan]]:
    """Scans on one grid as stacks. A series of three positions or more is a stack, a half of one, or repeats
    a part of one; a series of fewer belongs to the stack before it, and without any stack all are one.
    """
    series = defaultdict(list)
    for scan in scans:
        series[scan.images[0].series].append(scan)
    parts = sorted(series.values(), key=lambda part: (-depth(part), _begin(part)))
    stacks: list[list[Scan]] = []
    for part in (part for part in parts if depth(part) >= MIN_SLICES):
        for stack in stacks:
            joined = depth(stack + part)
            repeats = joined == depth(stack) and depth(part) < _COMPLETE * joined
            low, high = sorted(([scan.at for scan in half] for half in (stack, part)), key=min)
            if repeats or (max(low) < min(high) and _even(stack + part)):
                stack += part
                break
        else:
            stacks.append(part)
    small = [part for part in parts if depth(part) < MIN_SLICES]
    if small and not stacks:
        return [[scan for part in small for scan in part]]
    for part in small:
        fitting = [s for s in stacks if depth(s + part) == depth(s) or _even(s + part)]
        if fitting:
            earlier = [s for s in fitting if _begin(s) <= _begin(part)]
            max(earlier or fitting, key=_begin).extend(part)
        else:
            stacks.append(part)
    return stacks


def levels(scans: Sequence[Scan]) -> np.ndarray:
    """The number of the slice that each scan shows, along the normal; the slice may have moved a little from
    scan to scan.
    """
    at = [scan.at for scan in scans]
    gaps = np.diff(np.sort(at))
    gaps = gaps[gaps > SAME_MM]
    return _levels(at, max(SAME_MM, 0.4 * np.median(gaps)) if len(gaps) else SAME_MM)


def depth(scans: Sequence[Scan]) -> int:
    """How many slices the scans show."""
    return int(levels(scans).max()) + 1


def _levels(at: Sequence[float], apart_mm: float = SAME_MM) -> np.ndarray:
    order = np.argsort(at)
    found = np.zeros(len(at), int)
    found[order[1:]] = np.cumsum(np.diff(np.asarray(at)[order]) > apart_mm)
    return found


def _even(scans: Sequence[Scan]) -> bool:
    at, numbers = np.array([scan.at for scan in scans]), levels(scans)
    gaps = np.diff([at[numbers == z].mean() for z in range(depth(scans))])
    return bool(gaps.max() < 1.5 * np.median(gaps) and gaps.min() > 0.5 * np.median(gaps))


def _begin(scans: Sequence[Scan]) -> tuple:
    return min(scan.order for scan in scans)


def _normal(stack: Sequence[Scan]) -> np.ndarray:
    return stack[0].images[0].normal


def _short_axis(stack: Sequence[Scan]) -> bool:
    return abs(_normal(stack) @ _APEX) >= _SHORT_AXIS


def _best(stacks: Sequence[list[Scan]]) -> list[Scan]:
    """Short-axis before others, complete before others, then the latest; [] where none has enough slices."""
    found = [stack for stack in stacks if depth(stack) >= MIN_SLICES]
    found = [stack for stack in found if _short_axis(stack)] or found
    complete = _COMPLETE * max(map(depth, found), default=0)
    found = [stack for stack in found if depth(stack) >= complete]
    return max(found, key=lambda stack: max(scan.order for scan in stack), default=[])


def _why_not(stack: list[Scan], chosen: list[Scan]) -> str:
    if depth(stack) < MIN_SLICES:
        cosine = abs(_normal(stack) @ _normal(chosen)) if chosen else 0.0
        angle = np.rad2deg(np.arccos(min(cosine, 1.0)))
        if angle > 30:
            return f"fewer than {MIN_SLICES} parallel positions: a long-axis cine"
        return f"not parallel to the stack ({angle:.1f} degrees)" if angle > 1 else "beside the stack's grid"
    if _short_axis(chosen) and not _short_axis(stack):
        return "planes that are not a short axis's"
    complete = depth(stack) >= _COMPLETE * depth(chosen)
    return "another complete stack: the later one is used" if complete else "fewer slices than another stack"


def some(numbers: Iterable[int], limit: int = 8) -> str:
    """Numbers as text, the first of them where there are many."""
    numbers = sorted(set(numbers))
    shown = ", ".join("without number" if n < 0 else str(n) for n in numbers[:limit])
    return shown + (", ..." if len(numbers) > limit else "")
