"""Which series of a DICOM study are its short-axis cine: by geometry and time, not by description."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cmrssp.data.layouts.dicom_header import Image
from cmrssp.data.subject import listed

_MIN_FRAMES, _MIN_SLICES = 8, 3  # of a short-axis cine
_SAME_MM = 1.0  # positions that are nearer are the same slice
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


def choose(images: Sequence[Image]) -> tuple[list[Scan], list[tuple[str, str]]]:
    """The scans of a study's short-axis cine, if it has one; and what was left out, as (series, reason)."""
    left: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        left[image.reason].append(image)
    stacks = []
    for group in _grids(left.pop("", [])):
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
        (f"series {numbers(group)}", f"{why} ({len(group)} images)") for why, group in sorted(left.items())
    ]


def numbers(images: Sequence[Image]) -> str:
    """The numbers of their series."""
    return listed(sorted({image.number for image in images}))


def _grids(images: Sequence[Image]) -> list[list[Image]]:
    """Images with the same pixel grid and parallel planes; the last digits of the header do not count."""
    exact = defaultdict(list)
    for image in images:
        exact[image.grid, image.axes].append(image)
    groups: list[list[Image]] = []
    for members in sorted(exact.values(), key=len, reverse=True):
        for group in groups:
            cosines = np.multiply(group[0].axes, members[0].axes).reshape(2, 3).sum(axis=1)
            if cosines.min() >= _PARALLEL and np.allclose(group[0].grid, members[0].grid, rtol=1e-3):
                group += members
                break
        else:
            groups.append(members)
    return groups


def _scans(group: Sequence[Image]) -> list[Scan]:
    at = np.array([image.position for image in group]) @ group[0].normal
    slices = _numbered(at, _SAME_MM)
    parts = defaultdict(list)
    for image, z in zip(group, slices.tolist(), strict=True):
        parts[image.series, z].append(image)
    middle = {z: float(at[slices == z].mean()) for z in set(slices.tolist())}
    return [Scan(images, middle[z]) for (_, z), part in parts.items() for images in _passes(part)]


def _passes(images: Sequence[Image]) -> list[list[Image]]:
    """Images of one position, in the order of time, apart where the slice was scanned twice."""
    images = sorted(images, key=lambda image: image.order)
    times = _times(images)
    cuts = [k for k in range(1, len(times)) if times[k] <= times[k - 1]]
    runs = [range(a, b) for a, b in pairwise([0, *cuts, len(images)])]
    again = all(times[b[0]] < times[a[-1]] and times[a[0]] < times[b[-1]] for a, b in pairwise(runs))
    if again and min(map(len, runs)) >= _MIN_FRAMES:
        return [[images[k] for k in run] for run in runs]
    latest = dict(zip(times, images, strict=True))  # of two with the same time the later one
    return [[latest[time] for time in sorted(latest)]]


def _times(images: Sequence[Image]) -> list[float]:
    """By trigger time, else by temporal position, else by instance number, else as acquired."""
    for name in ("trigger_ms", "temporal", "instance"):
        values = [getattr(image, name) for image in images]
        if None not in values and len(set(values)) > len(values) / 4:
            return values
    return list(range(len(images)))


def _no_cine(images: Sequence[Image]) -> str:
    """Why the images of one position are no cine; "" for a cine."""
    if len(images) < _MIN_FRAMES:
        return f"fewer than {_MIN_FRAMES} frames at a position"
    triggers = np.array([image.trigger_ms for image in images], float)
    clock = sorted(image.clock_ms for image in images)
    steps = np.diff(triggers if np.ptp(triggers) >= CYCLE_MS else clock)  # not where a trigger is NaN
    return "each frame is of another heartbeat: perfusion or mapping" if np.median(steps) >= _BEAT_MS else ""


def _stacks(scans: Sequence[Scan]) -> list[list[Scan]]:
    """Scans on one grid as stacks. A series of three positions or more is a stack, a half of one, or repeats
    a part of one; a series of fewer belongs to the stack before it, and without any stack all are one.
    """
    series = defaultdict(list)
    for scan in scans:
        series[scan.images[0].series].append(scan)
    parts = sorted(series.values(), key=lambda part: (-_depth(part), _begin(part)))
    if not parts or _depth(parts[0]) < _MIN_SLICES:
        return [list(scans)] if parts else []
    stacks: list[list[Scan]] = []
    for part in parts:
        fitting = [stack for stack in stacks if _belongs(part, stack)]
        if fitting:
            max(fitting, key=lambda stack: (_begin(stack) <= _begin(part), _begin(stack))).extend(part)
        else:
            stacks.append(part)
    return stacks


def _belongs(part: list[Scan], stack: list[Scan]) -> bool:
    """Whether scans repeat a part of a stack, or extend it evenly."""
    if _depth(stack + part) == _depth(stack):
        return _depth(part) < _COMPLETE * _depth(stack)
    at, slices = np.array([scan.at for scan in stack + part]), levels(stack + part)
    gaps = np.diff([at[slices == z].mean() for z in range(slices.max() + 1)])
    even = gaps.max() < 1.5 * np.median(gaps) and gaps.min() > 0.5 * np.median(gaps)
    low, high = sorted(([scan.at for scan in half] for half in (stack, part)), key=min)
    return bool(even and (_depth(part) < _MIN_SLICES or max(low) < min(high)))


def levels(scans: Sequence[Scan]) -> np.ndarray:
    """The number of the slice that each scan shows; the slice may have moved a little from scan to scan."""
    at = np.array([scan.at for scan in scans])
    gaps = np.diff(np.sort(at))
    gaps = gaps[gaps > _SAME_MM]
    return _numbered(at, max(_SAME_MM, 0.4 * np.median(gaps)) if len(gaps) else _SAME_MM)


def _numbered(at: np.ndarray, apart_mm: float) -> np.ndarray:
    """For each position (N,) in mm how many others, further apart than that, lie before it."""
    bounds = np.sort(at)[1:][np.diff(np.sort(at)) > apart_mm]
    return np.searchsorted(bounds, at, side="right")


def _depth(scans: Sequence[Scan]) -> int:
    """How many slices the scans show."""
    return int(levels(scans).max()) + 1


def _begin(scans: Sequence[Scan]) -> tuple:
    return min(scan.order for scan in scans)


def _normal(stack: Sequence[Scan]) -> np.ndarray:
    return stack[0].images[0].normal


def _best(stacks: Sequence[list[Scan]]) -> list[Scan]:
    """Short-axis before others, complete before others, then the latest; [] where none has enough slices."""
    found = [stack for stack in stacks if _depth(stack) >= _MIN_SLICES]
    found = [stack for stack in found if abs(_normal(stack) @ _APEX) >= _SHORT_AXIS] or found
    complete = _COMPLETE * max(map(_depth, found), default=0)
    found = [stack for stack in found if _depth(stack) >= complete]
    return max(found, key=lambda stack: max(scan.order for scan in stack), default=[])


def _why_not(stack: list[Scan], chosen: list[Scan]) -> str:
    if not chosen:
        return f"fewer than {_MIN_SLICES} parallel slices"
    cosine = abs(_normal(stack) @ _normal(chosen))
    if cosine < _PARALLEL:
        return f"planes {np.rad2deg(np.arccos(cosine)):.1f} degrees off the chosen ones"
    complete = _depth(stack) >= _COMPLETE * _depth(chosen)
    return "another complete stack: the later one is used" if complete else "fewer slices than another stack"
