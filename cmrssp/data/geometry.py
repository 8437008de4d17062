"""The geometry that makes all cines alike.

A cine becomes (T, Z, H, W): slices from base to apex, rows towards the patient's back (or feet), columns
towards the patient's left, as far as the affine says. Axes are only swapped and reversed, never interpolated.
"""

from dataclasses import dataclass

import numpy as np

from cmrssp.data.subject import CORRECTED, USED

# Directions in RAS+ (nibabel's world): the apex lies to the patient's left, front and feet.
_APEX = np.array([-1.0, 1.0, -1.0]) / np.sqrt(3)
_LEFT = np.array([-1.0, 0.0, 0.0])
_BACK_AND_FEET = np.array([0.0, -1.0, -1.0]) / np.sqrt(2)
_MIN_SLICE_COSINE = 0.7  # below, the affine says nothing of the slice order (axis-aligned: 0.58)
_PIXEL_MM, _PITCH_MM = (0.4, 4.0), (3.0, 30.0)  # what a short-axis cine can have


@dataclass(frozen=True)
class Geometry:
    """Maps a file's array (X, Y, Z, T) to canonical (T, Z, H, W) and back; lengths in mm."""

    rows_axis: int  # which axis of the file, 0 or 1, becomes the rows
    flip: tuple[bool, bool, bool]  # slices, rows, columns reversed
    spacing_mm: tuple[float, float]  # rows, columns
    slice_pitch_mm: float
    # whether the affine tells base from apex; else slices are taken to run base to apex
    order_known: bool = True

    @classmethod
    def from_affine(cls, affine: np.ndarray) -> "Geometry":
        """From a 4x4 RAS+ affine. Slice order: positive cosine with the apex direction is base -> apex."""
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if not _usable(lengths):
            raise ValueError(
                f"expected an affine with three axes of finite length, got lengths {lengths.tolist()}"
            )
        unit = affine[:3, :3] / lengths

        def fit(rows: int, columns: int) -> float:
            return abs(unit[:, rows] @ _BACK_AND_FEET) + abs(unit[:, columns] @ _LEFT)

        rows, columns = (1, 0) if fit(1, 0) >= fit(0, 1) else (0, 1)
        to_apex = float(unit[:, 2] @ _APEX)
        flip = (
            to_apex <= -_MIN_SLICE_COSINE,
            bool(unit[:, rows] @ _BACK_AND_FEET < 0),
            bool(unit[:, columns] @ _LEFT < 0),
        )
        spacing_mm = (float(lengths[rows]), float(lengths[columns]))
        return cls(rows, flip, spacing_mm, _pitch(affine), abs(to_apex) >= _MIN_SLICE_COSINE)

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


def believe(affine: np.ndarray, zooms: np.ndarray) -> tuple[Geometry, list[tuple[str, str]]]:
    """The geometry of a file from its 4x4 affine and its voxel sizes (3,), and what is odd about them as
    (what, what was done). The affine is believed before the voxel sizes, where it says anything.

    Raises ValueError where neither gives a spacing.
    """
    lengths, zooms = np.linalg.norm(affine[:3, :3], axis=0), np.abs(np.asarray(zooms, float))
    set_zooms = _usable(zooms) and not (zooms == 1).all()
    odd = []
    if not _usable(lengths) or np.linalg.matrix_rank(affine[:3, :3] / np.maximum(lengths, 1e-9)) < 3:
        if not set_zooms:
            raise ValueError(
                f"expected a spacing in the affine or in pixdim, got axes of length {_mm(lengths)} and "
                f"pixdim {_mm(zooms)}; write the spacing into the header"
            )
        affine = np.diag([*zooms, 1.0])
        odd.append((f"the affine is empty: spacing {_mm(zooms)} from pixdim, axes as in a file without one",
                    CORRECTED))  # fmt: skip
    elif (np.abs(lengths - 1) < 1e-6).all() and set_zooms:
        affine = affine @ np.diag([*zooms, 1.0])
        odd.append((f"the affine has no spacing: {_mm(zooms)} from pixdim", CORRECTED))
    elif not np.allclose(lengths, zooms, rtol=0.01, equal_nan=False):
        odd.append(
            (f"pixdim says {_mm(zooms)}, the affine {_mm(lengths)}: the affine was believed", CORRECTED)
        )
    geometry = Geometry.from_affine(affine)
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    skew = float(np.abs(unit.T @ unit - np.eye(3)).max())
    if skew > 0.01:
        odd.append(
            (f"the direction cosines are not orthogonal (cosine {skew:.2f}): axes kept as stored", USED)
        )
    plausible = all(_PIXEL_MM[0] <= s <= _PIXEL_MM[1] for s in geometry.spacing_mm)
    if not (plausible and _PITCH_MM[0] <= geometry.slice_pitch_mm <= _PITCH_MM[1]):
        found = (*geometry.spacing_mm, geometry.slice_pitch_mm)
        odd.append((f"spacing {_mm(found)} (rows, columns, slices) is unusual for a short-axis cine", USED))
    return geometry, odd


def _pitch(affine: np.ndarray) -> float:
    """From slice plane to slice plane, which is less than the step of an axis that is not normal to them."""
    normal, step = np.cross(affine[:3, 0], affine[:3, 1]), np.linalg.norm(affine[:3, 2])
    distance = abs(affine[:3, 2] @ normal) / np.linalg.norm(normal)
    return float(distance if distance < 0.9999 * step else step)  # the rest is rounding


def _usable(lengths: np.ndarray) -> bool:
    return bool(np.isfinite(lengths).all() and (lengths > 1e-6).all() and (lengths < 1e6).all())


def _mm(lengths) -> str:
    return " x ".join(f"{length:.4g}" for length in lengths) + " mm"
