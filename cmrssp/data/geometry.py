"""The geometry that makes all cines alike.

A cine becomes (T, Z, H, W): slices from base to apex, rows towards the patient's back (or feet), columns
towards the patient's left, as far as the affine says. Axes are only swapped and reversed, never interpolated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cmrssp.data.plausibility import mm, slice_axis
from cmrssp.data.subject import CORRECTED, Finding

# Directions in RAS+ (nibabel's world): the apex lies to the patient's left, front and feet.
_APEX = np.array([-1.0, 1.0, -1.0]) / np.sqrt(3)
_LEFT = np.array([-1.0, 0.0, 0.0])
_BACK_AND_FEET = np.array([0.0, -1.0, -1.0]) / np.sqrt(2)
_MIN_SLICE_COSINE = 0.7  # below, the affine does not tell base from apex (axis-aligned slices: 0.58)


@dataclass(frozen=True)
class Geometry:
    """Maps a file's array (X, Y, Z, T) to canonical (T, Z, H, W) and back; lengths in mm."""

    axes: tuple[int, int, int]  # of the file, which become slices, rows, columns
    flip: tuple[bool, bool, bool]  # slices, rows, columns reversed
    spacing_mm: tuple[float, float]  # rows, columns
    slice_pitch_mm: float  # from slice plane to slice plane
    order_known: bool = True  # the affine tells base from apex; else the first slice is taken as the base

    @classmethod
    def from_affine(cls, affine: np.ndarray, slices: int = 2) -> "Geometry":
        """From a 4x4 RAS+ affine in mm and the file's axis that holds the slices."""
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        unit = affine[:3, :3] / lengths
        low, high = (axis for axis in range(3) if axis != slices)
        to_apex, to_back, to_left = unit.T @ _APEX, unit.T @ _BACK_AND_FEET, unit.T @ _LEFT  # of each axis
        swapped = abs(to_back[low]) + abs(to_left[high]) > abs(to_back[high]) + abs(to_left[low])
        rows, columns = (low, high) if swapped else (high, low)
        flip = (to_apex[slices] <= -_MIN_SLICE_COSINE, to_back[rows] < 0, to_left[columns] < 0)
        # Planes are nearer to each other than the step along an axis that is not normal to them.
        normal = np.cross(affine[:3, low], affine[:3, high])
        pitch = abs(affine[:3, slices] @ normal) / np.linalg.norm(normal)
        pitch = pitch if pitch < 0.9999 * lengths[slices] else lengths[slices]  # the rest is rounding
        spacing_mm = (float(lengths[rows]), float(lengths[columns]))
        known = bool(abs(to_apex[slices]) >= _MIN_SLICE_COSINE)
        return cls((slices, rows, columns), tuple(map(bool, flip)), spacing_mm, float(pitch), known)

    def to_canonical(self, array: np.ndarray) -> np.ndarray:
        """(X, Y, Z, T) -> (T, Z, H, W), a view."""
        return np.flip(array.transpose(3, *self.axes), np.flatnonzero((False, *self.flip)))

    def from_canonical(self, array: np.ndarray) -> np.ndarray:
        """(T, Z, H, W) -> (X, Y, Z, T), a view."""
        return np.flip(array, np.flatnonzero((False, *self.flip))).transpose(np.argsort((3, *self.axes)))


def from_header(
    affine: np.ndarray, zooms: np.ndarray, shape: Sequence[int]
) -> tuple[Geometry, list[Finding]]:
    """The geometry of a file from its 4x4 affine and voxel sizes (3,), both in mm, and what is odd about
    them. The affine wins if both have a spacing; raises ValueError if neither has.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    zooms_set = _usable(zooms) and not (zooms == 1).all()
    odd = []
    if not _usable(lengths) or np.linalg.matrix_rank(affine[:3, :3] / lengths) < 3:
        if not zooms_set:
            got = f"{mm(lengths)} and {mm(zooms)}"
            raise ValueError(f"expected a spacing in the affine or in pixdim, got {got}; add it")
        affine = np.diag([*zooms, 1.0])
        odd.append((f"the affine is empty: spacing {mm(zooms)} from pixdim, axes as stored", CORRECTED))
    elif np.allclose(lengths, 1, rtol=0, atol=1e-6) and zooms_set:
        affine = affine @ np.diag([*zooms, 1.0])
        odd.append((f"the affine has no spacing: {mm(zooms)} from pixdim", CORRECTED))
    elif not np.allclose(lengths, zooms, rtol=0.01):
        odd.append((f"pixdim says {mm(zooms)}, the affine {mm(lengths)}: the affine was used", CORRECTED))
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    slices, moved = slice_axis(shape, lengths)
    return Geometry.from_affine(affine, slices), odd + moved


def _usable(lengths: np.ndarray) -> bool:
    return bool(((lengths > 1e-6) & (lengths < 1e6)).all())  # not where one is NaN
